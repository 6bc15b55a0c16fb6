import { VarveError } from './errors.ts'
import { manifestFieldsJsonSchema, manifestSchema } from './manifest-schema.ts'
import { backupFolder, MANIFEST_FILE, parseManifestKey } from './storage-layout.ts'

/** The version of the manifest that this code writes. */
export const MANIFEST_VERSION = 1

/** The largest manifest that is read, in bytes. One disk takes about 600. */
export const MANIFEST_MAX_BYTES: number = 1024 * 1024

/** Why a disk was backed up in full where an increment was wanted. */
export type FallbackReason =
  | 'no-parent'
  | 'chain-limit'
  | 'parent-broken'
  | 'disk-new'
  | 'disk-replaced'
  | 'disk-shrunk'
  | 'disk-readonly'
  | 'format-raw'
  | 'format-qcow2-v2'
  | 'bitmap-missing'
  | 'bitmap-inconsistent'
  | 'bitmap-disabled'
  | 'bitmap-granularity'
  | 'bitmap-altered'
  | 'snapshot-missing'
  | 'snapshot-replaced'

/** `crash`: as after a power cut. `filesystem`: frozen by the guest agent. `offline`: the instance was stopped. */
export type Consistency = 'crash' | 'filesystem' | 'offline'

/** A digest of a stored object: see docs/storage-format.md. */
export interface ObjectDigest {
  /** BLAKE3 of the BLAKE3 digests of the object's blocks, one after the other; 64 lower-case hex digits. */
  readonly root: string
  /** Bytes in each block but the last. */
  readonly blockSize: number
}

/** What the manifest says of every disk, whatever its image is. */
interface ManifestDiskBase {
  /** The disk's target name, such as `vda`. */
  readonly name: string
  /** `incremental`: only what changed since the parent. */
  readonly kind: 'full' | 'incremental'
  /** Key of the image, relative to the manifest's folder. */
  readonly image: string
  /** Key of the list of block digests, relative to the manifest's folder. */
  readonly blocks: string
  /** Size of the guest's disk in bytes. */
  readonly virtualSize: number
  /** Size of the image object in bytes. */
  readonly storedSize: number
  /** Digest of the image object. */
  readonly digest: ObjectDigest
  /** The image that an incremental one rests on: `../<parent>/<image of the parent>`. */
  readonly backing?: string
  /** Why it is full though an increment was wanted. */
  readonly fallback?: FallbackReason
}

/** A disk that was a file or a block device, stored as a qcow2 image. */
export interface Qcow2ManifestDisk extends ManifestDiskBase {
  /** What the stored image is. */
  readonly format: 'qcow2'
  /** Cluster size of the image in bytes. */
  readonly clusterSize: number
  /** Where the disk had data, for the next increment; see docs/storage-format.md. None of raw disks. */
  readonly map?: ManifestFile
  /** The bitmap that records what changes after this backup, `varve-<id>`; none on raw disks. */
  readonly bitmap?: {
    /** Its name on the disk. */
    readonly name: string
    /** Bytes that one bit stands for. */
    readonly granularity: number
  }
  /** The source when it was backed up. */
  readonly source: {
    /** The file or block device on its host. */
    readonly path: string
    /** The format that it had there. */
    readonly format: 'qcow2' | 'raw'
  }
}

/** A disk that was an RBD image, stored as the stream that `rbd export-diff` writes. */
export interface RbdManifestDisk extends ManifestDiskBase {
  /** What the stored image is. */
  readonly format: 'rbd-diff'
  /** Where the stream's records are in it, so that a restore need not read it through; see docs/storage-format.md. */
  readonly index: ManifestFile
  /** The snapshot that was backed up, `varve-<id>`, and its number in the image. */
  readonly snapshot: {
    /** Its name. */
    readonly name: string
    /** Its number. */
    readonly id: number
  }
  /** The source when it was backed up: `<pool>/[<namespace>/]<image>` and the image's own id. */
  readonly source: {
    /** The image's name, with its pool and namespace. */
    readonly path: string
    /** Always this. */
    readonly format: 'rbd'
    /** The id that Ceph gave the image. */
    readonly imageId: string
  }
}

/** A disk in a stored image is counted in sectors of so many bytes. */
const SECTOR_SIZE = 512

/** The size of the disk in the header of a stored image: `virtualSize`, rounded up to whole sectors. */
export function imageSize({ virtualSize }: Qcow2ManifestDisk): number {
  return Math.ceil(virtualSize / SECTOR_SIZE) * SECTOR_SIZE
}

/** One disk in a backup. */
export type ManifestDisk = Qcow2ManifestDisk | RbdManifestDisk

/** A file stored beside the disks: the instance's definition, its NVRAM. */
export interface ManifestFile {
  /** Key, relative to the manifest's folder. */
  readonly key: string
  /** In bytes. */
  readonly size: number
  /** BLAKE3 of the bytes, 64 lower-case hex digits. */
  readonly blake3: string
}

/** The record of one backup. It is written last: it alone makes the backup exist. */
export interface BackupManifest {
  /** The version of the format; see docs/storage-format.md. */
  readonly version: typeof MANIFEST_VERSION
  /** Sorts by time; see docs/storage-format.md. */
  readonly id: string
  /** The id of the full backup that the chain began with. */
  readonly chain: string
  /** The backup that the increments rest on; absent in a full one. */
  readonly parent?: string
  /** `incremental` as soon as one of the disks is. */
  readonly kind: 'full' | 'incremental'
  /** Whose disks they are. */
  readonly instance: {
    /** Its name on its host. */
    readonly name: string
    /** libvirt's UUID of it; absent for plain images. */
    readonly uuid?: string
  }
  /** ISO 8601, UTC. */
  readonly startedAt: string
  /** The moment that the backup shows; ISO 8601, UTC. */
  readonly frozenAt: string
  /** ISO 8601, UTC. */
  readonly finishedAt: string
  /** What the moment is like to the guest's file systems. */
  readonly consistency: Consistency
  /** Whether the instance ran. */
  readonly running: boolean
  /** The disks that were backed up, in the order of the instance. */
  readonly disks: readonly ManifestDisk[]
  /** libvirt's XML of the instance. */
  readonly definition?: ManifestFile
  /** Its UEFI variables. */
  readonly nvram?: ManifestFile
  /** The programs that made it, by name. */
  readonly tools: Readonly<Record<string, string>>
}

/**
 * Reads a manifest that came from a storage. Nothing in it is trusted: every field, and what must hold
 * between them, is checked, also against `where.key`, the key that it was read from. Unknown fields are
 * dropped.
 *
 * @throws MANIFEST_VERSION for one of a newer version
 * @throws MANIFEST_INVALID for anything else that is wrong, with the first wrong field in `context.field`
 */
export function parseManifest(bytes: Uint8Array, where: { key: string }): BackupManifest {
  const { key } = where
  const place = parseManifestKey(key)
  if (place === undefined) throw invalidManifest(key, 'key', 'is no key of a manifest')

  const json = parseJson(bytes, key)
  const version = typeof json === 'object' && json !== null && 'version' in json ? json.version : undefined
  if (Number.isSafeInteger(version) && Number(version) > MANIFEST_VERSION) {
    throw new VarveError(
      'MANIFEST_VERSION',
      `The manifest ${key} has version ${version}; this Varve reads up to version ${MANIFEST_VERSION}. Upgrade Varve to use this backup.`,
      { context: { key, version: Number(version) } },
    )
  }

  const { success, data: manifest, error } = manifestSchema.safeParse(json)
  if (!success) {
    const [issue] = error.issues
    throw invalidManifest(key, issue?.path.join('.') || 'manifest', issue?.message ?? error.message)
  }
  if (manifest.id !== place.backup) throw invalidManifest(key, 'id', 'is not that of its folder')
  if (manifest.chain !== place.chain) throw invalidManifest(key, 'chain', 'is not that of its folder')
  if (manifest.instance.name !== place.instance) {
    throw invalidManifest(key, 'instance.name', 'is not that of its folder')
  }
  return manifest
}

/**
 * The bytes to store for a manifest: indented JSON, the fields always in the same order.
 *
 * @throws MANIFEST_INVALID where {@link parseManifest} would refuse them: such a manifest is never written
 */
export function serializeManifest(manifest: BackupManifest): Uint8Array {
  const { instance, chain, id } = manifest
  const key = `${backupFolder(instance.name, chain, id)}/${MANIFEST_FILE}`
  const ordered = parseManifest(encodeJson(manifest), { key })
  return encodeJson(ordered)
}

/**
 * The JSON schema of a manifest, draft 2020-12; it is also in the package as `schema/manifest.v1.json`. It
 * says what each field may be. The rules between fields are in docs/storage-format.md.
 */
export function manifestJsonSchema(): object {
  return {
    $id: `urn:varve:manifest:${MANIFEST_VERSION}`,
    title: 'Varve backup manifest',
    ...manifestFieldsJsonSchema(),
  }
}

function encodeJson(value: BackupManifest): Uint8Array {
  return new TextEncoder().encode(`${JSON.stringify(value, undefined, 2)}\n`)
}

function parseJson(bytes: Uint8Array, key: string): unknown {
  if (bytes.byteLength > MANIFEST_MAX_BYTES) {
    throw invalidManifest(key, 'size', `is over ${MANIFEST_MAX_BYTES} bytes`)
  }
  try {
    return JSON.parse(new TextDecoder('utf-8', { fatal: true }).decode(bytes))
  } catch (cause) {
    throw invalidManifest(key, 'manifest', 'is not JSON in UTF-8', cause)
  }
}

function invalidManifest(key: string, field: string, what: string, cause?: unknown): VarveError {
  return new VarveError(
    'MANIFEST_INVALID',
    `The manifest ${key} is broken (${field}: ${what}). Put the file back from a copy of the storage, or delete the backup.`,
    { context: { key, field }, cause },
  )
}
