import type { Readable } from 'node:stream'
import type { ImageExtents } from '@varve/qcow2'
import { VarveError } from './errors.ts'
import type { RunOptions } from './run-options.ts'

/** What the path of a disk that is an RBD image begins with: `rbd:<pool>/[<namespace>/]<image>`. */
export const RBD_PREFIX = 'rbd:'

/** In Ceph `/` parts pool, namespace and image, and `@` begins a snapshot; a name that begins with `-` is an option. */
const NAME = /^[^-/@\s\p{Cc}][^/@\p{Cc}]*$/u

/** Whether a text is `<pool>/[<namespace>/]<image>`. */
export function isRbdImage(text: string): boolean {
  const names = text.split('/')
  return (
    text.length <= 512 && (names.length === 2 || names.length === 3) && names.every(name => NAME.test(name))
  )
}

/** `<pool>/[<namespace>/]<image>` of a path such as `rbd:pool/image`; undefined for the path of a file. @throws INVALID_ARGUMENT */
export function rbdImageOf(path: string): string | undefined {
  if (!path.startsWith(RBD_PREFIX)) return undefined
  const image = path.slice(RBD_PREFIX.length)
  if (isRbdImage(image)) return image
  throw new VarveError(
    'INVALID_ARGUMENT',
    `Not an RBD image: ${JSON.stringify(path)}. It is rbd:<pool>/<image> or rbd:<pool>/<namespace>/<image>.`,
    { context: { path } },
  )
}

/** How a cluster is reached. What is left out comes from Ceph's own configuration. */
export interface RbdConnection {
  /** The monitors, each as `host` or `host:port`. */
  readonly monitors?: readonly string[]
  /** Path of a `ceph.conf`. */
  readonly conf?: string
  /** The cephx user, such as `libvirt` for `client.libvirt`. */
  readonly user?: string
  /** The user's key, in base64. A secret. */
  readonly key?: string
}

/** Makes {@link RbdCluster}s; `CephConnector` of `@varve/ceph` is the one that drives the `rbd` command. */
export interface RbdConnector {
  /** The cluster at the end of a connection; without one, that of the connector's own options. Nothing is asked yet. */
  cluster(connection?: RbdConnection): RbdCluster
}

/** A snapshot of an RBD image. */
export interface RbdSnapshot {
  /** Its name. */
  readonly name: string
  /** Its number in the image; never used again. */
  readonly id: number
}

/** An RBD image, as it is now. */
export interface RbdImage {
  /** The id that Ceph gave it; an image that is made again under the same name has another one. */
  readonly id: string
  /** In bytes. */
  readonly size: number
  /** The oldest first. */
  readonly snapshots: readonly RbdSnapshot[]
  /** The image's metadata of the keys that begin with `varve.`. */
  readonly metadata: ReadonlyMap<string, string>
  /** Whether Ceph has found its object map to be wrong and so goes without it. Not told of that of a snapshot. */
  readonly objectMapInvalid: boolean
  /** The group of images that it is in. */
  readonly group?: string
  /** Whether it is mirrored to or from another cluster. */
  readonly mirrored?: boolean
}

/** What shows that an image is another one later, or was written to. */
export interface ImageState {
  /** The id that Ceph gave it. */
  readonly id: string
  /** When it was last written to, as Ceph tells it, which notes that once a minute. Absent where it does not. */
  readonly writtenAt?: string
}

/** What is exported: the content of a snapshot, or what changed from another one to it. */
export interface RbdExport {
  /** The name of the snapshot that the stream leads to. */
  readonly snapshot: string
  /** The name of the one that it starts from. Default: none, for a full stream. */
  readonly from?: string
}

/** What one stream of `rbd export-diff` holds, and where. */
export interface RbdDiff {
  /** The name of the snapshot that it starts from; absent in a full one. */
  readonly fromSnapshot?: string
  /** The name of the snapshot that it leads to. */
  readonly toSnapshot: string
  /** The size of the image at that snapshot, in bytes. */
  readonly size: number
  /** The bytes of the whole stream. */
  readonly streamSize: number
  /** The bytes of the image that it carries. */
  readonly dataSize: number
  /**
   * Runs that cover the image, with the places of their data in the stream. What the stream does not mention is
   * unallocated: unchanged in an increment, zeros in a full one.
   */
  readonly extents: ImageExtents
}

/** A stream of `rbd export-diff` under way. */
export interface RbdDiffStream {
  /**
   * The bytes. Fails as the command does, such as with RBD_SNAPSHOT_NOT_FOUND, and with RBD_STREAM_INVALID where they
   * are not what was asked for, are no such stream, or end early; where nobody reads it yet, whoever does then gets
   * the error. Destroying it ends the command.
   */
  readonly stream: Readable
  /** How far into the image the records are that have passed, in bytes. */
  readonly position: number
  /** What the stream said. Only once it has ended. */
  diff(): RbdDiff
}

/**
 * A Ceph cluster with RBD images, each named `<pool>/[<namespace>/]<image>`. Whatever changes it may be called again
 * after it was cut short. Every call ends within a bounded time when the cluster does not answer, with
 * CEPH_UNREACHABLE. Any call may end with that, with CEPH_ACCESS_DENIED, CEPH_POOL_NOT_FOUND, DISK_NOT_FOUND,
 * INVALID_CONFIG, or with RBD_FAILED where `rbd` fails otherwise.
 */
export interface RbdCluster {
  /** What it is reached by, its monitors or configuration, which tells it from other clusters. Without the user. */
  readonly address: string
  /** The version of Ceph that the program which reads images is of, such as `16.2.15`. */
  version(run?: RunOptions): Promise<string>
  /** @throws DISK_NOT_FOUND */
  image(image: string, run?: RunOptions): Promise<RbdImage>
  /** The id that Ceph gave an image; undefined where there is none of that name, or no such pool. */
  imageId(image: string, run?: RunOptions): Promise<string | undefined>
  /** What an image is known by later. @throws DISK_NOT_FOUND */
  imageState(image: string, run?: RunOptions): Promise<ImageState>
  /** The snapshots that users made, the oldest first. @throws DISK_NOT_FOUND */
  snapshots(image: string, run?: RunOptions): Promise<RbdSnapshot[]>
  /** Takes a snapshot where there is none of that name. Also while a client has the image open. */
  createSnapshot(image: string, snapshot: string, run?: RunOptions): Promise<void>
  /**
   * Removes snapshots; those that are not there are left out, and no error where the image is gone.
   * @throws RBD_SNAPSHOT_PROTECTED
   */
  removeSnapshots(image: string, snapshots: readonly string[], run?: RunOptions): Promise<void>
  /** What `rbd export-diff` writes of a snapshot; its version 1. */
  exportDiff(image: string, what: RbdExport, run?: RunOptions): RbdDiffStream
  /** The names of the images in the pool, or namespace, of an image: each `<pool>/[<namespace>/]<image>`. */
  imagesBeside(image: string, run?: RunOptions): Promise<string[]>
  /** The clones that rest on snapshots of an image, each `<pool>/[<namespace>/]<image>`. */
  clones(image: string, run?: RunOptions): Promise<string[]>
  /** Whether a client has the image open. */
  isOpen(image: string, run?: RunOptions): Promise<boolean>
  /**
   * Makes an image, or finds the one of that name and size. Its features, its layout and its metadata, such as limits of
   * its rate, are those of `like`, where given. @throws TARGET_EXISTS where one of another size has the name
   */
  createImage(image: string, options: { size: number; like?: string }, run?: RunOptions): Promise<void>
  /** Renames an image within its pool; no error where that has been done. Whoever has it open keeps it. @throws TARGET_EXISTS */
  renameImage(from: string, to: string, run?: RunOptions): Promise<void>
  /** Removes an image with its `varve-` snapshots; no error where it is gone. @throws RBD_FAILED with other snapshots, RBD_SNAPSHOT_PROTECTED with clones, DISK_BUSY */
  removeImage(image: string, run?: RunOptions): Promise<void>
  /** Writes a piece of metadata of the image. */
  setMetadata(image: string, key: string, value: string, run?: RunOptions): Promise<void>
  /** Removes metadata of the image; that which is not there is left out, and no error where the image is gone. */
  removeMetadata(image: string, keys: readonly string[], run?: RunOptions): Promise<void>
  /** Brings an image back to a snapshot, size included. @throws RBD_SNAPSHOT_NOT_FOUND, DISK_BUSY */
  rollback(image: string, snapshot: string, run?: RunOptions): Promise<void>
  /**
   * A file name of QEMU's rbd driver, which its programs open as the raw image. It names a key's file and never a key.
   *
   * @param folder a private folder that the key's file may be put in; QEMU needs it until it has opened the image
   */
  fileName(image: string, folder: string): Promise<string>
}
