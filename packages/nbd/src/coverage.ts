/** Pieces that are apart from each other; no server sends a read so scattered. */
const MAX_PIECES = 1024

/**
 * Which bytes of a read have arrived. Each must arrive exactly once, in whatever order.
 *
 * Chunks mostly come in ascending order, and then this is one number.
 */
export class Coverage {
  /** Everything before this has arrived. */
  #prefix = 0
  /** What has arrived after a gap: ascending, apart from each other, `[start, end, start, end, …]`. */
  #pieces: number[] = []

  /** Adds bytes `start` to `end`. False when some of them were there before, or when they are too scattered. */
  add(start: number, end: number): boolean {
    const pieces = this.#pieces
    if (start === this.#prefix && (pieces[0] ?? end) >= end) {
      this.#prefix = end
      if (pieces[0] === end) {
        this.#prefix = pieces[1] ?? end
        pieces.splice(0, 2)
      }
      return true
    }
    if (start < this.#prefix) return false
    return this.#addPiece(start, end)
  }

  /** Whether all of `length` bytes have arrived. */
  isComplete(length: number): boolean {
    return this.#prefix === length
  }

  #addPiece(start: number, end: number): boolean {
    const pieces = this.#pieces
    let at = 0
    while (at < pieces.length && (pieces[at] ?? 0) < start) at += 2
    const previousEnd = pieces[at - 1] ?? -1
    const nextStart = pieces[at] ?? Number.POSITIVE_INFINITY
    if (previousEnd > start || nextStart < end) return false
    const joinsPrevious = previousEnd === start
    const joinsNext = nextStart === end
    if (joinsPrevious && joinsNext) pieces.splice(at - 1, 2)
    else if (joinsPrevious) pieces[at - 1] = end
    else if (joinsNext) pieces[at] = start
    else pieces.splice(at, 0, start, end)
    return pieces.length <= 2 * MAX_PIECES
  }
}
