import { Qcow2Error } from './errors.ts'
import { ExtentKind, MAX_RUNS } from './extent-list.ts'
import { grown } from './grown.ts'

const UNALLOCATED = -1
const ZERO = -2

/**
 * What an image holds: contiguous runs that cover its disk from the first byte to the last, in typed arrays of
 * 16 bytes a run. Neighbours are joined where they are of one kind and, for data, contiguous in the file too.
 */
export class ImageExtents {
  #count = 0
  #size = 0
  #starts = new Float64Array(16)
  #offsets = new Float64Array(16)
  readonly #most: number

  /** No runs yet, and `most` at most. Default: 16,777,216, which take 256 MiB of memory. */
  constructor(most: number = MAX_RUNS) {
    this.#most = most
  }

  /** The number of runs. */
  get count(): number {
    return this.#count
  }

  /** The first guest byte of run `index`. */
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
    const offset = this.#offsets[this.#checked(index)]
    if (offset === UNALLOCATED) return ExtentKind.unallocated
    return offset === ZERO ? ExtentKind.zero : ExtentKind.data
  }

  /** Where run `index` begins in the file, or -1 where it is no data. */
  fileOffset(index: number): number {
    return Math.max(-1, this.#offsets[this.#checked(index)] ?? -1)
  }

  /**
   * Adds a run at the end; `fileOffset` is where it begins in the file, and counts for data only. Throws
   * `QCOW2_UNSUPPORTED` when there are too many.
   */
  append(length: number, kind: ExtentKind, fileOffset: number): void {
    const offset = kind === ExtentKind.data ? fileOffset : kind === ExtentKind.zero ? ZERO : UNALLOCATED
    if (!this.#continues(offset)) {
      if (this.#count === this.#most)
        throw new Qcow2Error(
          'QCOW2_UNSUPPORTED',
          `It has more than ${this.#most} runs of data, zeros and nothing.`,
          { runs: this.#most },
        )
      if (this.#count === this.#starts.length) {
        this.#starts = grown(this.#starts)
        this.#offsets = grown(this.#offsets)
      }
      this.#starts[this.#count] = this.#size
      this.#offsets[this.#count] = offset
      this.#count++
    }
    this.#size += length
  }

  #continues(offset: number): boolean {
    if (this.#count === 0) return false
    const last = this.#offsets[this.#count - 1] ?? 0
    if (offset < 0 || last < 0) return offset === last
    return offset === last + this.#size - (this.#starts[this.#count - 1] ?? 0)
  }

  #checked(index: number): number {
    if (Number.isInteger(index) && index >= 0 && index < this.#count) return index
    throw new Qcow2Error('QCOW2_ARGUMENT', `There is no extent ${index} in an image of ${this.#count}.`, {
      index,
    })
  }
}
