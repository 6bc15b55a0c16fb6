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

/**
 * Finds where there was data and is none any more, from the extents of `base:allocation` as they come. A guest that zeroes
 * or discards also marks the bitmap; a disk that somebody shrinks and grows again has zeros where its bitmap shows no write.
 * The extents are to be exact: one cluster may hold both what was cut off and what is left.
 */
export class LostData {
  /** What was found, in whole clusters. */
  readonly ranges: RangeList = new RangeList()
  readonly #was: RangeList
  readonly #clusterSize: number
  /** The first range of `#was` that ends behind all that came so far. */
  #next = 0
  /** Where the last found range ends. */
  #end = 0

  /**
   * @param before undefined where that is not known: then all that reads as zero may have been data
   */
  constructor(before: DataMap | undefined, parentSize: number, clusterSize: number) {
    this.#was = before?.data ?? wholeDisk(parentSize)
    this.#clusterSize = clusterSize
  }

  /** The next extent. */
  append(start: number, end: number, flags: number): void {
    if ((flags & STATE_ZERO) === 0) return
    const was = this.#was
    while (this.#next < was.count && was.end(this.#next) <= start) this.#next++
    for (let n = this.#next; n < was.count && was.start(n) < end; n++)
      this.#lose(Math.max(start, was.start(n)), Math.min(end, was.end(n)))
  }

  #lose(start: number, end: number): void {
    const size = this.#clusterSize
    const from = Math.max(this.#end, Math.floor(start / size) * size)
    const to = Math.ceil(end / size) * size
    if (to <= from) return
    this.ranges.append(from, to)
    this.#end = to
  }
}

function wholeDisk(size: number): RangeList {
  const whole = new RangeList()
  if (size > 0) whole.append(0, size)
  return whole
}

/**
 * Writes a {@link DataMap} down as bytes, from the extents of `base:allocation` as they come; the same map always gives the
 * same bytes.
 *
 * 15 bytes `varve data map\n`, the version (1), the size of the disk (le64), then for each range in ascending order two
 * integers in LEB128: the bytes between the range before and this one, and the bytes of this one.
 */
export class DataMapWriter {
  readonly #most: number
  #writer: ByteWriter | undefined = new ByteWriter()
  /** Where the last range that was written ends. */
  #written = 0
  /** The range that may go on. */
  #start = 0
  #end = 0

  /**
   * @param size - Of the disk, in bytes.
   * @param most - How many bytes there may be.
   */
  constructor(size: number, most: number) {
    this.#most = most
    const header = Buffer.alloc(HEADER_BYTES)
    header.write(MAGIC, 'latin1')
    header.writeUInt8(VERSION, MAGIC.length)
    header.writeBigUInt64LE(BigInt(size), 16)
    this.#writer?.bytes(header)
  }

  /** The next extent. */
  append(start: number, end: number, flags: number): void {
    if ((flags & STATE_ZERO) !== 0) return
    if (start > this.#end) {
      this.#write()
      this.#start = start
    }
    this.#end = end
  }

  /** The bytes, or undefined where there are too many. */
  finish(): Uint8Array | undefined {
    this.#write()
    this.#start = this.#end
    return this.#writer?.written
  }

  #write(): void {
    const writer = this.#writer
    if (!writer || this.#end === this.#start) return
    writer.varint(this.#start - this.#written)
    writer.varint(this.#end - this.#start)
    this.#written = this.#end
    if (writer.length > this.#most) this.#writer = undefined
  }
}

/**
 * Reads what a {@link DataMapWriter} wrote. The bytes are untrusted: no range may leave the disk or overlap, and time and
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
