import { NbdError } from './errors.ts'

/** The most extents of a map: with the end of the last 192 MiB of memory, or 1 TiB that changes at every 64 KiB. */
export const MAX_EXTENTS = 16_777_215

/**
 * What one metadata context tells of a whole export: extents in ascending order that cover it without gaps,
 * neighbours of equal flags joined. Twelve bytes of memory an extent.
 */
export class ExtentMap {
  /** How many extents there are. */
  readonly count: number
  readonly #starts: Float64Array
  readonly #flags: Uint32Array

  /**
   * @param starts - Where each extent begins in bytes, and after them the size of the export.
   * @param flags - The status flags of each extent.
   */
  constructor(starts: Float64Array, flags: Uint32Array) {
    this.count = flags.length
    this.#starts = starts
    this.#flags = flags
  }

  /** Where extent `index` begins, in bytes. */
  start(index: number): number {
    return this.#starts[index] ?? Number.NaN
  }

  /** How long extent `index` is, in bytes. */
  length(index: number): number {
    return this.start(index + 1) - this.start(index)
  }

  /**
   * The status flags of extent `index`. Of `base:allocation`: bit 0 is a hole, bit 1 reads as zero. Of
   * `qemu:dirty-bitmap:NAME`: bit 0 is dirty.
   */
  flags(index: number): number {
    return this.#flags[index] ?? Number.NaN
  }
}

/** What becomes of flags of which a piece has more than one: joins those of a part of it with those of the next. */
export type FlagsRule = (one: number, other: number) => number

/** Whoever is told of each extent, as the server knows it and before it is rounded. */
export type OnExtent = (start: number, end: number, flags: number) => void

/** How an {@link ExtentMapBuilder} builds. */
export interface ExtentMapOptions {
  /** Of the export, in bytes. */
  readonly size: number
  /** Bytes of a piece, all of which has the same flags: a power of two. Default: 1. */
  readonly granularity?: number
  /** The flags of a piece. Default: the union of those that its bytes have. */
  readonly join?: FlagsRule
  /** Called with extents in ascending order, without gaps between. */
  readonly onExtent?: OnExtent | undefined
  /** How many extents there may be. Default: {@link MAX_EXTENTS}. */
  readonly most?: number
}

/** Builds an {@link ExtentMap} from extents as they come. */
export class ExtentMapBuilder {
  readonly #size: number
  readonly #granularity: number
  readonly #join: FlagsRule
  readonly #onExtent: OnExtent | undefined
  readonly #most: number
  #starts = new Float64Array(64)
  #flags = new Uint32Array(64)
  #count = 0
  #end = 0
  /** The piece that {@link ExtentMapBuilder.end} is in, and the flags that it has so far. */
  #pieceStart = 0
  #pieceEnd = 0
  #pieceFlags = 0

  constructor(options: ExtentMapOptions) {
    const { size, granularity = 1, join = (one, other) => (one | other) >>> 0, most = MAX_EXTENTS } = options
    this.#size = size
    this.#granularity = granularity
    this.#join = join
    this.#onExtent = options.onExtent
    this.#most = most
  }

  /** Up to where the extents reach so far, in bytes. */
  get end(): number {
    return this.#end
  }

  /**
   * Adds an extent that leaves no gap; what lies before {@link ExtentMapBuilder.end} or behind the export is left out.
   * Throws `NBD_FRAGMENTED` when there are too many.
   */
  append(start: number, length: number, flags: number): void {
    const end = Math.min(start + length, this.#size)
    let from = this.#end
    if (end <= from) return
    this.#onExtent?.(from, end, flags)
    this.#end = end
    if (from < this.#pieceEnd) {
      this.#pieceFlags = this.#join(this.#pieceFlags, flags)
      if (end < this.#pieceEnd) return
      from = this.#pieceEnd
      this.#add(this.#pieceStart, this.#pieceFlags)
    }
    const over = end === this.#size ? 0 : end & (this.#granularity - 1)
    if (from < end - over) this.#add(from, flags)
    if (over > 0) {
      this.#pieceStart = end - over
      this.#pieceEnd = Math.min(end - over + this.#granularity, this.#size)
      this.#pieceFlags = flags
    }
  }

  /** The map, once {@link ExtentMapBuilder.end} is the end of the export. */
  build(): ExtentMap {
    const starts = this.#starts.slice(0, this.#count + 1)
    starts[this.#count] = this.#size
    return new ExtentMap(starts, this.#flags.slice(0, this.#count))
  }

  /** Whole pieces from `start` on have these flags. */
  #add(start: number, flags: number): void {
    if (this.#count > 0 && this.#flags[this.#count - 1] === flags) return
    if (this.#count === this.#most)
      throw new NbdError(
        'NBD_FRAGMENTED',
        `The export has more than ${this.#most} extents in pieces of ${this.#granularity} bytes. A larger granularity joins them.`,
        { context: { most: this.#most, granularity: this.#granularity, reached: start } },
      )
    // One place is kept for the end of the last extent.
    if (this.#count + 1 === this.#starts.length) {
      const starts = new Float64Array(this.#starts.length * 2)
      const allFlags = new Uint32Array(this.#starts.length * 2)
      starts.set(this.#starts)
      allFlags.set(this.#flags)
      this.#starts = starts
      this.#flags = allFlags
    }
    this.#starts[this.#count] = start
    this.#flags[this.#count] = flags
    this.#count++
  }
}
