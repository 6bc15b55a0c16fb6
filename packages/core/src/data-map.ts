import type { ExtentMap } from '@varve/nbd'
import { VarveError } from './errors.ts'
import { RangeList } from './range-list.ts'
import { ByteWriter, VarintReader } from './varint.ts'

/** NBD protocol, "base:allocation": reads as zeroes. */
export const STATE_ZERO = 2

const MAGIC = 'varve data map\n'
const VERSION = 1
const HEADER_BYTES = 24

/** Runs that cover a disk, as {@link ExtentMap} holds them. */
export type Runs = Pick<ExtentMap, 'count' | 'start' | 'length' | 'flags'>

/** Where a disk has data: all else reads as zero. */
export interface DataMap {
  /** The disk's size in bytes. */
  readonly size: number
  readonly data: RangeList
}

/** Where a disk has data, by its context `base:allocation`. */
export function dataMap(allocation: Runs, size: number): DataMap {
  const data = new RangeList()
  for (let i = 0; i < allocation.count; i++) {
    const start = allocation.start(i)
    if ((allocation.flags(i) & STATE_ZERO) === 0) data.append(start, start + allocation.length(i))
  }
  return { size, data }
}

/**
 * Where there was data and is none any more. A guest that zeroes or discards also marks the bitmap; a disk that somebody
 * shrinks and grows again has zeros where its bitmap shows no write.
 *
 * @param before undefined where that is not known: then all that reads as zero may have been data
 */
export function lostData(before: DataMap | undefined, allocation: Runs, parentSize: number): RangeList {
  const lost = new RangeList()
  const was = before?.data ?? wholeDisk(parentSize)
  for (let i = 0, k = 0; i < allocation.count && k < was.count; i++) {
    const start = allocation.start(i)
    const end = start + allocation.length(i)
    while (k < was.count && was.end(k) <= start) k++
    if ((allocation.flags(i) & STATE_ZERO) === 0) continue
    for (let n = k; n < was.count && was.start(n) < end; n++)
      lost.append(Math.max(start, was.start(n)), Math.min(end, was.end(n)))
  }
  return lost
}

function wholeDisk(size: number): RangeList {
  const whole = new RangeList()
  if (size > 0) whole.append(0, size)
  return whole
}

/**
 * A {@link DataMap} as bytes; the same map always gives the same.
 *
 * 15 bytes `varve data map\n`, the version (1), the size of the disk (le64), then for each range in ascending order two
 * integers in LEB128: the bytes between the range before and this one, and the bytes of this one.
 */
export function encodeDataMap({ size, data }: DataMap): Uint8Array {
  const header = Buffer.alloc(HEADER_BYTES)
  header.write(MAGIC, 'latin1')
  header.writeUInt8(VERSION, MAGIC.length)
  header.writeBigUInt64LE(BigInt(size), 16)
  const writer = new ByteWriter()
  writer.bytes(header)
  let end = 0
  for (let i = 0; i < data.count; i++) {
    writer.varint(data.start(i) - end)
    end = data.end(i)
    writer.varint(end - data.start(i))
  }
  return writer.written
}

/**
 * Reads what {@link encodeDataMap} gave. The bytes are untrusted: no range may leave the disk or overlap, and time and
 * memory are bounded by the bytes that there are.
 *
 * @throws IMAGE_INVALID
 */
export function decodeDataMap(bytes: Uint8Array): DataMap {
  const header = Buffer.from(bytes.buffer, bytes.byteOffset, Math.min(bytes.length, HEADER_BYTES))
  if (header.length < HEADER_BYTES || header.toString('latin1', 0, MAGIC.length) !== MAGIC)
    throw invalid('it does not begin as one')
  const version = header.readUInt8(MAGIC.length)
  if (version !== VERSION) throw invalid(`it is of version ${version}, which only a newer Varve can read`)
  const size = Number(header.readBigUInt64LE(16))
  if (!Number.isSafeInteger(size)) throw invalid('its size is too large')
  const reader = new VarintReader(bytes, HEADER_BYTES)
  const data = new RangeList()
  for (let covered = 0; reader.left > 0; ) {
    const start = covered + reader.next()
    const end = start + reader.next()
    // written so that a NaN is refused
    if (!(start >= covered && end > start && end <= size)) throw invalid('a range leaves the disk')
    data.append(start, end)
    covered = end
  }
  return { size, data }
}

function invalid(what: string): VarveError {
  return new VarveError(
    'IMAGE_INVALID',
    `The map of a disk's data is damaged or forged: ${what}. Backups do without it.`,
  )
}
