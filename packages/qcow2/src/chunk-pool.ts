/**
 * Buffers of a stream that are used again. Each has memory of its own, so that a view of it shows which one
 * it is, and is given out whole or cut at its end.
 */
export class ChunkPool {
  readonly #free = new Map<number, Buffer[]>()
  readonly #lent = new WeakMap<ArrayBufferLike, Buffer>()

  /** A buffer of `length` bytes in memory of `capacity` bytes. It may hold old bytes: the taker fills it wholly. */
  take(capacity: number, length: number): Buffer {
    const buffer = this.#free.get(capacity)?.pop() ?? Buffer.allocUnsafeSlow(capacity)
    this.#lent.set(buffer.buffer, buffer)
    return length === capacity ? buffer : buffer.subarray(0, length)
  }

  /** Takes back the memory of a buffer. One that is not lent, or already back, is left alone. */
  give(chunk: Uint8Array): void {
    const buffer = this.#lent.get(chunk.buffer)
    if (!buffer) return
    this.#lent.delete(chunk.buffer)
    const free = this.#free.get(buffer.length)
    if (free) free.push(buffer)
    else this.#free.set(buffer.length, [buffer])
  }
}
