/** A part of a disk that begins at the byte which was asked for. */
export interface MappedRun {
  /** Where the part begins in the file; undefined where the file does not hold its bytes as they are. */
  readonly fileOffset: number | undefined
  /** Its length in bytes; infinite behind the last run. */
  readonly length: number
}

const FIELDS = 3 // start, end and file offset of a run

/**
 * Where an image file holds the bytes of its disk as they are: ascending runs, in typed arrays of 24 bytes a run.
 * What lies between them is nothing, or zeros, or in another form or file.
 */
export class ImageMap {
  #count = 0
  #runs = new Float64Array(FIELDS * 64)

  /** The number of runs. */
  get count(): number {
    return this.#count
  }

  /** Adds a run behind all others. */
  append(start: number, length: number, fileOffset: number): void {
    const at = this.#count * FIELDS
    const lastEnd = this.#runs[at - 2] ?? 0
    if (start < lastEnd || length < 1)
      throw new RangeError(`A run of ${length} bytes at ${start}, where the last one ends at ${lastEnd}.`)
    if (at === this.#runs.length) {
      const grown = new Float64Array(at * 2)
      grown.set(this.#runs)
      this.#runs = grown
    }
    this.#runs.set([start, start + length, fileOffset], at)
    this.#count++
  }

  /** The part of the disk that run `index` is. */
  run(index: number): { readonly start: number; readonly length: number } {
    const [start = 0, end = 0] = this.#runs.subarray(index * FIELDS, (index + 1) * FIELDS)
    return { start, length: end - start }
  }

  /** Where the disk's byte at `offset` is, and how many follow it in the same way. */
  at(offset: number): MappedRun {
    let low = 0 // becomes the first run that ends behind the byte
    for (let high = this.#count; low < high; ) {
      const middle = (low + high) >>> 1
      if ((this.#runs[middle * FIELDS + 1] ?? 0) <= offset) low = middle + 1
      else high = middle
    }
    if (low === this.#count) return { fileOffset: undefined, length: Number.POSITIVE_INFINITY }
    const [start = 0, end = 0, fileOffset = 0] = this.#runs.subarray(low * FIELDS, (low + 1) * FIELDS)
    if (offset < start) return { fileOffset: undefined, length: start - offset }
    return { fileOffset: fileOffset + offset - start, length: end - offset }
  }
}
