/** Ascending ranges of a disk that do not touch each other, in typed arrays of 16 bytes a range. */
export class RangeList {
  #count = 0
  #bounds = new Float64Array(2 * 64)

  /** The number of ranges. */
  get count(): number {
    return this.#count
  }

  /** Where a range begins, in bytes. */
  start(index: number): number {
    return this.#bounds[index * 2] ?? 0
  }

  /** Where a range ends: the first byte that is not of it. */
  end(index: number): number {
    return this.#bounds[index * 2 + 1] ?? 0
  }

  /** Adds a range behind all others; one that touches the last makes it longer. */
  append(start: number, end: number): void {
    const at = this.#count * 2
    const lastEnd = at === 0 ? -1 : (this.#bounds[at - 1] ?? 0)
    if (start < lastEnd || end <= start)
      throw new RangeError(`A range from ${start} to ${end}, where the last one ends at ${lastEnd}.`)
    if (start === lastEnd) {
      this.#bounds[at - 1] = end
      return
    }
    if (at === this.#bounds.length) {
      const larger = new Float64Array(at * 2)
      larger.set(this.#bounds)
      this.#bounds = larger
    }
    this.#bounds[at] = start
    this.#bounds[at + 1] = end
    this.#count++
  }
}
