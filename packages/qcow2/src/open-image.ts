import { Qcow2Error } from './errors.ts'
import { MAX_RUNS } from './extent-list.ts'
import type { ImageExtents } from './image-extents.ts'
import type { ImageFile } from './image-file.ts'
import { HEADER_READ_BYTES, parseHeader } from './parse-header.ts'
import type { BackingFile } from './plan-image.ts'
import { readTables } from './read-tables.ts'

/** A qcow2 image that was read: what its disk holds, and where. */
export interface Qcow2Image {
  /** The size of the disk in bytes. */
  readonly virtualSize: number
  /** In bytes. */
  readonly clusterSize: number
  /** The image that unallocated runs read from; absent in a full one. The name is untrusted input. */
  readonly backing?: BackingFile
  /** What the disk holds. */
  readonly extents: ImageExtents
}

/** Options of {@link openImage}. */
export interface OpenOptions {
  /** Gives up: the call rejects as the file's reads do. */
  signal?: AbortSignal
  /**
   * The most runs that the image may have; each takes 16 bytes of memory, and twice that while the list of them grows.
   * Default, and most: 16,777,216. No image with more can be planned.
   */
  maxRuns?: number
}

/**
 * Reads the tables of a qcow2 image such as Varve writes. The file is untrusted input: every size and offset
 * is checked against the file's size before it is used, and memory and time are bounded by the bytes of the
 * tables that the file truly has.
 *
 * Refused with `QCOW2_UNSUPPORTED` is all that Varve does not write: other versions, encryption, internal
 * snapshots, bitmaps, compressed clusters, extended L2 entries, external data files, zero clusters with space
 * in the file, feature bits of any kind, header extensions other than a backing file's format, sizes that are no
 * multiple of 512, and whatever is not in its place: header, refcount table, refcount blocks, L1 table, L2 tables and
 * data clusters in guest order, with nothing between them and nothing after. That order makes reads sequential and
 * overlaps impossible. An image that QEMU has opened for writing is refused, as it does not keep to that. The refcounts
 * themselves are not read: they matter to writers. Refused so is, too, an image of more runs than `maxRuns`.
 *
 * Refused with `QCOW2_INVALID` is what contradicts itself or the file's size: a file that is damaged, forged or
 * cut short. An error of the file's reads is thrown as it is.
 */
export async function openImage(file: ImageFile, options: OpenOptions = {}): Promise<Qcow2Image> {
  const { signal } = options
  const maxRuns = Math.min(options.maxRuns ?? MAX_RUNS, MAX_RUNS)
  if (!Number.isSafeInteger(file.size) || file.size < 0)
    throw new Qcow2Error('QCOW2_ARGUMENT', `Not the size of a file: ${file.size}.`, { size: file.size })
  const bytes = new Uint8Array(Math.min(file.size, HEADER_READ_BYTES))
  await file.read(0, bytes, signal ? { signal } : {})
  const header = parseHeader(bytes, file.size)
  const extents = await readTables(file, header, { maxRuns, signal })
  const { virtualSize, clusterSize, backing } = header
  return backing ? { virtualSize, clusterSize, backing, extents } : { virtualSize, clusterSize, extents }
}
