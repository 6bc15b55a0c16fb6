import { z } from 'zod'
import { VarveError } from './errors.ts'

/** The version of the manifest that this code writes. */
export const MANIFEST_VERSION = 1

/** Why a disk was backed up in full where an increment was wanted. */
export type FallbackReason =
  | 'no-parent'
  | 'chain-limit'
  | 'parent-broken'
  | 'disk-new'
  | 'disk-shrunk'
  | 'format-raw'
  | 'bitmap-missing'
  | 'bitmap-inconsistent'
  | 'bitmap-disabled'
  | 'bitmap-granularity'

/** `crash`: as after a power cut. `filesystem`: frozen by the guest agent. `offline`: the instance was stopped. */
export type Consistency = 'crash' | 'filesystem' | 'offline'

/** A digest of a stored object: see docs/storage-format.md. */
export interface ObjectDigest {
  /** BLAKE3 of the BLAKE3 digests of the object's blocks, one after the other; 64 lower-case hex digits. */
  readonly root: string
  /** Bytes in each block but the last. */
  readonly blockSize: number
}

/** One disk in a backup. */
export interface ManifestDisk {
  /** The disk's target name, such as `vda`. */
  readonly name: string
  /** `incremental`: only what changed since the parent. */
  readonly kind: 'full' | 'incremental'
  /** Key of the image, relative to the manifest's folder. */
  readonly image: string
  /** Key of the list of block digests, relative to the manifest's folder. */
  readonly blocks: string
  /** Always qcow2. */
  readonly format: 'qcow2'
  /** Size of the guest's disk in bytes. */
  readonly virtualSize: number
  /** Size of the image object in bytes. */
  readonly storedSize: number
  /** Cluster size of the image in bytes. */
  readonly clusterSize: number
  readonly digest: ObjectDigest
  /** The backing file name written in the image, where it is incremental. */
  readonly backing?: string
  /** The bitmap that records what changes after this backup; none on raw disks. */
  readonly bitmap?: { readonly name: string; readonly granularity: number }
  /** Why it is full though an increment was wanted. */
  readonly fallback?: FallbackReason
  /** The source when it was backed up. */
  readonly source: { readonly path: string; readonly format: 'qcow2' | 'raw' }
}

/** A file stored beside the disks: the instance's definition, its NVRAM. */
export interface ManifestFile {
  /** Key, relative to the manifest's folder. */
  readonly key: string
  readonly size: number
  /** BLAKE3 of the bytes, 64 lower-case hex digits. */
  readonly blake3: string
}

/** The record of one backup. It is written last: it alone makes the backup exist. */
export interface BackupManifest {
  readonly version: typeof MANIFEST_VERSION
  /** Sorts by time; see docs/storage-format.md. */
  readonly id: string
  /** The id of the full backup that the chain began with. */
  readonly chain: string
  /** The backup that the increments rest on; absent in a full one. */
  readonly parent?: string
  readonly kind: 'full' | 'incremental'
  readonly instance: { readonly name: string; readonly uuid?: string }
  /** ISO 8601, UTC. */
  readonly startedAt: string
  /** The moment that the backup shows; ISO 8601, UTC. */
  readonly frozenAt: string
  /** ISO 8601, UTC. */
  readonly finishedAt: string
  readonly consistency: Consistency
  /** Whether the instance ran. */
  readonly running: boolean
  readonly disks: readonly ManifestDisk[]
  /** libvirt's XML of the instance. */
  readonly definition?: ManifestFile
  readonly nvram?: ManifestFile
  /** The programs that made it, by name. */
  readonly tools: Readonly<Record<string, string>>
}
