import { Qcow2Error } from './errors.ts'
import { grown } from './grown.ts'

/** The most runs of a disk that is planned or read: as many as a disk of 1 TiB has that changes at every 64 KiB. */
export const MAX_RUNS: number = 2 ** 24

/** What a run of a guest disk is; see {@link ExtentKind:type}. */
export const ExtentKind = {
  /** Not in this image. */
  unallocated: 0,
  /** Reads as zeros. */
  zero: 1,
  /** Stored in this image. */
  data: 2,
} as const

/**
 * - `unallocated` (0): not in this image; it reads as the backing file does, and as zeros without one.
 * - `zero` (1): reads as zeros, whatever the backing file holds.
 * - `data` (2): stored in this image.
 */
export type ExtentKind = (typeof ExtentKind)[keyof typeof ExtentKind]

/**
 * Contiguous runs that cover a guest disk from its first byte to its last, in typed arrays: 9 bytes a run.
 * Runs are appended in order; one of the same kind as the last is joined with it.
 */
export class ExtentList {
  #count = 0
  #size = 0
  #starts: Float64Array
  #kinds: Uint8Array

  /** An empty list with room for `capacity` runs; it grows as needed. */
  constructor(capacity = 1024) {
    this.#starts = new Float64Array(capacity)
    this.#kinds = new Uint8Array(capacity)
  }

  /** The number of runs. */
  get count(): number {
    return this.#count
  }

  /** The bytes that the runs cover: the size of the disk. */
  get size(): number {
    return this.#size
  }

  /**
   * Adds `length` bytes of `kind` at the end. No bytes are no run.
   * Throws `QCOW2_ARGUMENT` for a length that is negative or no integer, past 2^53 bytes in all;
   * `QCOW2_FRAGMENTED` past 16,777,216 runs, as no image with more of them is read again.
   */
  append(length: number, kind: ExtentKind): void {
    const size = this.#size + length
    if (!Number.isSafeInteger(length) || length < 0 || !Number.isSafeInteger(size))
      throw new Qcow2Error('QCOW2_ARGUMENT', `Not the length of an extent: ${length}.`, { length })
    if (length === 0) return
    if (this.#count === 0 || this.#kinds[this.#count - 1] !== kind) {
      if (this.#count === MAX_RUNS)
        throw new Qcow2Error(
          'QCOW2_FRAGMENTED',
          `The disk has more than ${MAX_RUNS} runs of data, zeros and nothing. A larger cluster size joins them.`,
          { runs: MAX_RUNS, covered: this.#size },
        )
      if (this.#count === this.#starts.length) {
        this.#starts = grown(this.#starts)
        this.#kinds = grown(this.#kinds)
      }
      this.#starts[this.#count] = this.#size
      this.#kinds[this.#count] = kind
      this.#count++
    }
    this.#size = size
  }

  /** The first byte of run `index`. */
  start(index: number): number {
    return this.#starts[this.#checked(index)] ?? 0
  }

  /** The bytes of run `index`. */
  length(index: number): number {
    const end = index + 1 < this.#count ? this.#starts[index + 1] : this.#size
    return (end ?? 0) - this.start(index)
  }

  /** What run `index` is. */
  kind(index: number): ExtentKind {
    return this.#kinds[this.#checked(index)] as ExtentKind
  }

  #checked(index: number): number {
    if (Number.isInteger(index) && index >= 0 && index < this.#count) return index
    throw new Qcow2Error('QCOW2_ARGUMENT', `There is no extent ${index} in a list of ${this.#count}.`, {
      index,
    })
  }
}
