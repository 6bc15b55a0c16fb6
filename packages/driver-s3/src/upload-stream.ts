import { Readable } from 'node:stream'
import { type ByteRange, errorMessage, readUpload, type UploadBody } from '@varve/core'

/** Options of {@link UploadStream}. */
export interface UploadStreamOptions {
  /** The key that is uploaded, for messages. */
  key: string
  /** Only these bytes of a replayable body. Default: all. */
  range?: ByteRange
  /** Fails the stream with `ABORTED`, until its last byte has been taken. */
  signal?: AbortSignal | undefined
  /** Called with the length of each chunk that has been handed to the network. What it throws fails the stream. */
  onSent?: (bytes: number) => void
  /** Called before the last chunk is given, when the source has ended as it should. What it throws fails the stream. */
  onLast?: () => void
}

const chunksOnTheirWay = new WeakMap<Uint8Array, () => void>()

/** Tells the stream that a chunk came from that nothing reads its memory any more. */
export function chunkSent(chunk: Uint8Array): void {
  chunksOnTheirWay.get(chunk)?.()
  chunksOnTheirWay.delete(chunk)
}

/**
 * The bytes of a body, or of a part of it, as the body of one request. The last chunk is held back until the
 * source has ended as it should: a server takes an object for whole once it has all of its bytes.
 */
export class UploadStream extends Readable {
  /** Why the source failed, or a callback, where one did. A request that broke off for another reason leaves it undefined. */
  failure: { error: unknown } | undefined
  /** Whether the last byte has been given, from where on the server may have the whole. */
  complete = false
  readonly #body: UploadBody
  readonly #source: AsyncGenerator<Uint8Array>
  readonly #givenUp = new AbortController()
  readonly #onSent: ((bytes: number) => void) | undefined
  readonly #onLast: (() => void) | undefined
  #held: Uint8Array | undefined

  constructor(body: UploadBody, { signal, onSent, onLast, ...options }: UploadStreamOptions) {
    super({ highWaterMark: 1 }) // one chunk waits while the next is read: none are joined, which copies
    const ends = signal ? AbortSignal.any([signal, this.#givenUp.signal]) : this.#givenUp.signal
    this.#body = body
    this.#source = readUpload(body, { ...options, signal: ends })
    this.#onSent = onSent
    this.#onLast = onLast
  }

  override _read(): void {
    this.#next().then(
      chunk => {
        if (!this.destroyed) this.push(chunk ?? null)
      },
      error => {
        if (!this.destroyed) this.#fail(error)
      },
    )
  }

  override _destroy(error: Error | null, done: (error?: Error | null) => void): void {
    this.#givenUp.abort(error)
    this.#source.return(undefined).then(
      () => done(error),
      () => done(error),
    )
  }

  async #next(): Promise<Buffer | undefined> {
    const held = this.#held
    this.#held = undefined
    if (this.complete) return undefined
    let ready = held
    for (;;) {
      const { value, done } = await this.#source.next()
      if (done) {
        this.#onLast?.()
        this.complete = true
        return ready && this.#track(ready)
      }
      if (ready) {
        this.#held = value
        return this.#track(ready)
      }
      ready = value
    }
  }

  #track(chunk: Uint8Array): Buffer {
    // a view of its own, by which the chunk is known again
    const view = Buffer.from(chunk.buffer, chunk.byteOffset, chunk.byteLength)
    chunksOnTheirWay.set(view, () => {
      try {
        this.#body.recycle?.(chunk)
        this.#onSent?.(chunk.byteLength)
      } catch (error) {
        this.#fail(error)
      }
    })
    return view
  }

  #fail(error: unknown): void {
    this.failure ??= { error }
    this.destroy(error instanceof Error ? error : new Error(errorMessage(error)))
  }
}
