import { Qcow2Error } from './errors.ts'
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
}

/**
 * Reads the tables of a qcow2 image such as Varve writes. The file is untrusted input: every size and offset
 * is checked against the file's size before it is used, and memory and time are bounded by the bytes of the
 * tables that the file truly has.
 *
 * Refused with `QCOW2_UNSUPPORTED` is all that Varve does not write: other versions, encryption, internal
 * snapshots, bitmaps, compressed clusters, extended L2 entries, external data files, zero clusters with space
 * in the file, incompatible feature bits, a backing file without its format, sizes that are no multiple of
 * 512, and tables or data clusters that are not in ascending order (refcount table, L1 table, L2 tables, data
 * in guest order): that order makes reads sequential and overlaps impossible. Header extensions and compatible
 * features that are not known are ignored, as the format says. Refcounts are not read: they matter to writers.
 *
 * Refused with `QCOW2_INVALID` is what contradicts itself or the file's size: a file that is damaged, forged or
 * cut short. An error of the file's reads is thrown as it is.
 */
export async function openImage(file: ImageFile, options: OpenOptions = {}): Promise<Qcow2Image> {
  const { signal } = options
  if (!Number.isSafeInteger(file.size) || file.size < 0)
    throw new Qcow2Error('QCOW2_ARGUMENT', `Not the size of a file: ${file.size}.`, { size: file.size })
  const bytes = new Uint8Array(Math.min(file.size, HEADER_READ_BYTES))
  await file.read(0, bytes, signal ? { signal } : {})
  const header = parseHeader(bytes, file.size)
  const extents = await readTables(file, header, signal)
  const { virtualSize, clusterSize, backing } = header
  return backing ? { virtualSize, clusterSize, backing, extents } : { virtualSize, clusterSize, extents }
}
