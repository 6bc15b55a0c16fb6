import { z } from 'zod'
import { BACKUP_ID_FORM, isBackupId } from './backup-id.ts'
import { BLOCK_LIST_MAX_BYTES, blockListBytes } from './block-list.ts'
import type {
  BackupManifest,
  Consistency,
  FallbackReason,
  ManifestDisk,
  ManifestFile,
  ObjectDigest,
  Qcow2ManifestDisk,
  RbdManifestDisk,
} from './manifest.ts'
import { isRbdImage } from './rbd.ts'
import { MANIFEST_FILE } from './storage-layout.ts'
import { DEFINITION_MAX_BYTES } from './xml-elements.ts'

/** A check of every field of `T`, the optional ones too: `satisfies` keeps schema and interface from drifting apart. */
type FieldsOf<T> = { [K in keyof Required<T>]: z.ZodType<T[K]> }

/** Every word of a union, so that none can be forgotten. */
type WordsOf<T extends string> = { [Word in T]: Word }

const fallbackReasons: WordsOf<FallbackReason> = {
  'no-parent': 'no-parent',
  'chain-limit': 'chain-limit',
  'parent-broken': 'parent-broken',
  'disk-new': 'disk-new',
  'disk-replaced': 'disk-replaced',
  'disk-shrunk': 'disk-shrunk',
  'disk-readonly': 'disk-readonly',
  'format-raw': 'format-raw',
  'format-qcow2-v2': 'format-qcow2-v2',
  'bitmap-missing': 'bitmap-missing',
  'bitmap-inconsistent': 'bitmap-inconsistent',
  'bitmap-disabled': 'bitmap-disabled',
  'bitmap-granularity': 'bitmap-granularity',
  'bitmap-altered': 'bitmap-altered',
  'snapshot-missing': 'snapshot-missing',
  'snapshot-replaced': 'snapshot-replaced',
}
const consistencies: WordsOf<Consistency> = { crash: 'crash', filesystem: 'filesystem', offline: 'offline' }

const backupId = z.string().regex(BACKUP_ID_FORM).refine(isBackupId, 'has no real date and time in it')
const time = z.iso.datetime()
const byteCount = z.int().min(0)
const blake3 = z
  .string()
  .regex(/^[0-9a-f]{64}$/)
  .describe('BLAKE3, lower-case hex')

/** One plain file name beside the manifest: no folder, nothing hidden, nothing that an option or a path could be. */
const fileName = z.string().regex(/^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$/)

function powerOfTwo(min: number, max: number): z.ZodNumber {
  return z
    .int()
    .min(min)
    .max(max)
    .refine(value => Number.isInteger(Math.log2(value)), 'is no power of two')
}

const digest = z.object({
  root: blake3.describe('BLAKE3 of the list of block digests'),
  blockSize: powerOfTwo(64 * 1024, 64 * 1024 * 1024).describe('bytes in each block but the last'),
} satisfies FieldsOf<ObjectDigest>)

/** The largest of the small files, in bytes: they are held in memory. The largest UEFI variables are of 64 MiB. */
export const FILE_MAX_BYTES: number = 256 * 1024 * 1024

/** The largest map of a disk's data, in bytes: of eight times as much memory. The next increment does without one. */
export const MAP_MAX_BYTES: number = 32 * 1024 * 1024

const file = z.object({
  key: fileName,
  size: byteCount.max(FILE_MAX_BYTES),
  blake3,
} satisfies FieldsOf<ManifestFile>)

const diskFields = {
  name: z.string().regex(/^[A-Za-z0-9_-]{1,64}$/),
  kind: z.enum(['full', 'incremental']),
  image: fileName,
  blocks: fileName,
  virtualSize: byteCount,
  storedSize: byteCount,
  digest,
  backing: z.string().describe('../<parent>/<the image of this disk in it>').exactOptional(),
  fallback: z.enum(fallbackReasons).exactOptional(),
}

const qcow2Disk = z.object({
  ...diskFields,
  format: z.literal('qcow2'),
  clusterSize: powerOfTwo(4096, 2 * 1024 * 1024),
  map: file.extend({ size: byteCount.max(MAP_MAX_BYTES) }).exactOptional(),
  bitmap: z.object({ name: z.string(), granularity: powerOfTwo(512, 2 ** 31) }).exactOptional(),
  source: z.object({ path: z.string().min(1).max(4096), format: z.enum(['qcow2', 'raw']) }),
} satisfies FieldsOf<Qcow2ManifestDisk>)

const rbdDisk = z.object({
  ...diskFields,
  format: z.literal('rbd-diff'),
  index: file,
  snapshot: z.object({ name: z.string(), id: z.int().min(0) }),
  source: z.object({
    path: z.string().refine(isRbdImage, 'is no <pool>/[<namespace>/]<image>'),
    format: z.literal('rbd'),
    imageId: z.string().regex(/^[A-Za-z0-9]{1,128}$/),
  }),
} satisfies FieldsOf<RbdManifestDisk>)

const disk = z.discriminatedUnion('format', [qcow2Disk, rbdDisk])

const manifest = z.object({
  version: z.literal(1),
  id: backupId,
  chain: backupId.describe('id of the full backup that the chain began with'),
  parent: backupId.exactOptional(),
  kind: z.enum(['full', 'incremental']),
  // The name is compared with the folder's, which is one.
  instance: z.object({ name: z.string(), uuid: z.guid().exactOptional() }),
  startedAt: time,
  frozenAt: time.describe('the moment that the backup shows'),
  finishedAt: time,
  consistency: z.enum(consistencies),
  running: z.boolean(),
  disks: z.array(disk).min(1),
  definition: file.extend({ size: byteCount.max(DEFINITION_MAX_BYTES) }).exactOptional(),
  nvram: file.exactOptional(),
  tools: z.record(z.string().min(1).max(64), z.string().max(1000)),
} satisfies FieldsOf<BackupManifest>)

/**
 * The fields of a manifest and the rules that hold between them. Fields that it does not know are dropped:
 * a later minor version may add some.
 */
export const manifestSchema: z.ZodType<BackupManifest> = manifest.superRefine((value, context) => {
  for (const { path, message } of contradictions(value)) context.addIssue({ code: 'custom', path, message })
})

/** The fields alone as a JSON schema; JSON Schema cannot say the rules between them. */
export function manifestFieldsJsonSchema(): object {
  return z.toJSONSchema(manifest, { io: 'input' })
}

interface Contradiction {
  readonly path: (string | number)[]
  readonly message: string
}

/** What is wrong between the fields of a manifest whose fields are each well-formed. */
function* contradictions(value: BackupManifest): Generator<Contradiction> {
  const { id, chain, parent } = value
  if (value.kind === 'full') {
    if (parent !== undefined) yield { path: ['parent'], message: 'a full backup has no parent' }
    if (chain !== id) yield { path: ['chain'], message: 'a full backup begins a chain of its own id' }
  } else {
    // Ids sort by time: what a backup rests on is older. This also makes a circle of parents impossible.
    if (parent === undefined) yield { path: ['parent'], message: 'an incremental backup has a parent' }
    else if (parent >= id) yield { path: ['parent'], message: 'the parent is older than the backup' }
    else if (parent < chain) yield { path: ['chain'], message: 'the chain is no younger than the parent' }
    if (!value.disks.some(disk => disk.kind === 'incremental')) {
      yield { path: ['disks'], message: 'an incremental backup has an incremental disk' }
    }
  }

  for (const [index, disk] of value.disks.entries()) {
    yield* diskContradictions(disk, value, ['disks', index])
  }

  const names = new Set<string>()
  const keys = new Set([MANIFEST_FILE])
  for (const [index, disk] of value.disks.entries()) {
    if (names.has(disk.name)) yield { path: ['disks', index, 'name'], message: 'another disk has this name' }
    names.add(disk.name)
    const files: (readonly [path: string[], key: string])[] = [
      [['image'], disk.image],
      [['blocks'], disk.blocks],
    ]
    if (disk.format === 'rbd-diff') files.push([['index', 'key'], disk.index.key])
    else if (disk.map) files.push([['map', 'key'], disk.map.key])
    for (const [path, key] of files) {
      if (keys.has(key)) yield { path: ['disks', index, ...path], message: 'another file has this key' }
      keys.add(key)
    }
  }
  for (const field of ['definition', 'nvram'] as const) {
    const key = value[field]?.key
    if (key === undefined) continue
    if (keys.has(key)) yield { path: [field, 'key'], message: 'another file has this key' }
    keys.add(key)
  }
}

function* diskContradictions(
  disk: ManifestDisk,
  { id, kind, parent }: BackupManifest,
  path: (string | number)[],
): Generator<Contradiction> {
  if (blockListBytes(disk.storedSize, disk.digest) > BLOCK_LIST_MAX_BYTES)
    yield { path: [...path, 'digest', 'blockSize'], message: 'the list of block digests is over 1 GiB' }
  if (disk.kind === 'full') {
    if (disk.backing !== undefined) yield { path: [...path, 'backing'], message: 'a full disk has none' }
  } else {
    if (kind === 'full') yield { path: [...path, 'kind'], message: 'a full backup has full disks only' }
    const prefix = `../${parent}/`
    const isImageOfParent =
      disk.backing?.startsWith(prefix) && fileName.safeParse(disk.backing.slice(prefix.length)).success
    if (!isImageOfParent) yield { path: [...path, 'backing'], message: `is ${prefix}<image>` }
    if (disk.fallback !== undefined) {
      yield { path: [...path, 'fallback'], message: 'an incremental disk did not fall back' }
    }
  }
  const mark = disk.format === 'qcow2' ? disk.bitmap : disk.snapshot
  if (mark && mark.name !== `varve-${id}`) {
    yield {
      path: [...path, disk.format === 'qcow2' ? 'bitmap' : 'snapshot', 'name'],
      message: `is varve-${id}`,
    }
  }
}
