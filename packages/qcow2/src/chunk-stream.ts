import { Readable } from 'node:stream'
import type { ChunkPool } from './chunk-pool.ts'

/** What a {@link ChunkStream} reads, and how. */
export interface ChunkSource {
  /** Fills `into` with bytes from `offset` on; rejects only when nothing writes to `into` any more. */
  read(offset: number, into: Uint8Array, signal: AbortSignal): Promise<void>
  readonly start: number
  readonly end: number
  readonly chunkSize: number
  /** The most chunks that are being read or wait to be taken, at one time. */
  readonly readAhead: number
  readonly pool: ChunkPool
  readonly signal: AbortSignal | undefined
}

interface Slot {
  readonly chunk: Buffer
  filled: boolean
}

/**
 * The bytes of a source in chunks, in order, with several reads in flight. An object stream, so that each
 * chunk reaches the consumer as it is: a byte stream would join chunks, which copies them.
 */
export class ChunkStream extends Readable {
  readonly #source: ChunkSource
  readonly #slots: Slot[] = []
  readonly #abort = new AbortController()
  #next: number
  #wanted = false

  constructor(source: ChunkSource) {
    super({ objectMode: true, highWaterMark: 1 })
    this.#source = source
    this.#next = source.start
    if (source.signal?.aborted) this.#giveUp()
    else source.signal?.addEventListener('abort', this.#giveUp)
  }

  override _read(): void {
    this.#wanted = true
    this.#advance()
  }

  override _destroy(error: Error | null, callback: (error?: Error | null) => void): void {
    this.#source.signal?.removeEventListener('abort', this.#giveUp)
    this.#abort.abort(error ?? undefined)
    for (const slot of this.#slots) if (slot.filled) this.#source.pool.give(slot.chunk)
    callback(error)
  }

  readonly #giveUp = (): void => {
    const reason: unknown = this.#source.signal?.reason
    this.destroy(reason instanceof Error ? reason : new Error('The stream was given up.', { cause: reason }))
  }

  /** Hands over what is ready, as long as it is wanted, and keeps reads in flight. */
  #advance(): void {
    while (!this.destroyed) {
      while (this.#slots.length < this.#source.readAhead && this.#next < this.#source.end) this.#startRead()
      if (!this.#wanted) return
      const slot = this.#slots[0]
      if (!slot) {
        this.push(null)
        return
      }
      if (!slot.filled) return
      this.#slots.shift()
      this.#wanted = this.push(slot.chunk)
    }
  }

  #startRead(): void {
    const { pool, chunkSize, end } = this.#source
    const offset = this.#next
    const length = Math.min(chunkSize, end - offset)
    const slot: Slot = { chunk: pool.take(chunkSize, length), filled: false }
    this.#next += length
    this.#slots.push(slot)
    this.#source.read(offset, slot.chunk, this.#abort.signal).then(
      () => {
        slot.filled = true
        if (this.destroyed) pool.give(slot.chunk)
        else this.#advance()
      },
      (error: unknown) => {
        pool.give(slot.chunk)
        this.destroy(error instanceof Error ? error : new Error(String(error)))
      },
    )
  }
}
