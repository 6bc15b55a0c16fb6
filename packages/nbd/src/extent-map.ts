import { protocolError } from './errors.ts'

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

/** Builds an {@link ExtentMap} from extents as they come. */
export class ExtentMapBuilder {
  readonly #size: number
  readonly #most: number
  #starts = new Float64Array(64)
  #flags = new Uint32Array(64)
  #count = 0
  #end = 0

  /**
   * @param size - Of the export, in bytes.
   * @param most - How many extents there may be.
   */
  constructor(size: number, most: number = MAX_EXTENTS) {
    this.#size = size
    this.#most = most
  }

  /** Up to where the extents reach so far, in bytes. */
  get end(): number {
    return this.#end
  }

  /**
   * Adds an extent that leaves no gap; what lies before {@link ExtentMapBuilder.end} or behind the export is left out.
   * Throws `NBD_PROTOCOL` when there are too many.
   */
  append(start: number, length: number, flags: number): void {
    const end = Math.min(start + length, this.#size)
    if (end <= this.#end) return
    if (this.#count === 0 || this.#flags[this.#count - 1] !== flags) this.#begin(flags)
    this.#end = end
  }

  /** The map, once {@link ExtentMapBuilder.end} is the end of the export. */
  build(): ExtentMap {
    const starts = this.#starts.slice(0, this.#count + 1)
    starts[this.#count] = this.#size
    return new ExtentMap(starts, this.#flags.slice(0, this.#count))
  }

  #begin(flags: number): void {
    if (this.#count === this.#most)
      throw protocolError(`it tells of more than ${this.#most} extents`, { reached: this.#end })
    // One place is kept for the end of the last extent.
    if (this.#count + 1 === this.#starts.length) {
      const starts = new Float64Array(this.#starts.length * 2)
      const allFlags = new Uint32Array(this.#starts.length * 2)
      starts.set(this.#starts)
      allFlags.set(this.#flags)
      this.#starts = starts
      this.#flags = allFlags
    }
    this.#starts[this.#count] = this.#end
    this.#flags[this.#count] = flags
    this.#count++
  }
}
