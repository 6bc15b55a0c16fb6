import { Readable } from 'node:stream'
import { type ByteRange, errorMessage, readUpload, type UploadBody } from '@varve/core'

/** Options of {@link UploadStream}. */
export interface UploadStreamOptions {
  /** The key that is uploaded, for messages. */
  key: string
  /** The least size of its chunks but the last, in bytes: smaller ones are copied together. Default: any. */
  leastChunk?: number | undefined
  /** Only these bytes of a replayable body. Default: all. */
  range?: ByteRange
  /** Fails the stream with `ABORTED`, until its last byte has been taken. */
  signal?: AbortSignal | undefined
  /** Called with the length of each chunk that has been handed to the network. What it throws fails the stream. */
  onSent?: (bytes: number) => void
  /** Called before the last chunk is given, when the source has ended as it should. What it throws fails the stream. */
  onLast?: () => void
}

/** What is sent as one: a chunk of the source, to be given back, or a copy of several. */
interface Piece {
  readonly bytes: Uint8Array
  /** Whether the memory is the source's. */
  readonly lent: boolean
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
  readonly #source: AsyncGenerator<Piece>
  readonly #givenUp = new AbortController()
  readonly #onSent: ((bytes: number) => void) | undefined
  readonly #onLast: (() => void) | undefined
  #held: Piece | undefined

  constructor(body: UploadBody, { signal, onSent, onLast, leastChunk = 0, ...options }: UploadStreamOptions) {
    super({ highWaterMark: 1 }) // one chunk waits while the next is read: none are joined, which copies
    const ends = signal ? AbortSignal.any([signal, this.#givenUp.signal]) : this.#givenUp.signal
    this.#body = body
    this.#source = this.#pieces(readUpload(body, { ...options, signal: ends }), leastChunk)
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

  /** The chunks of the source, of which those that are too small are copied together and given back at once. */
  async *#pieces(source: AsyncGenerator<Uint8Array>, least: number): AsyncGenerator<Piece> {
    const small = Buffer.allocUnsafeSlow(least)
    let length = 0
    for await (const chunk of source) {
      if (length === 0 && chunk.byteLength >= least) {
        yield { bytes: chunk, lent: true }
        continue
      }
      const whole = length + chunk.byteLength
      if (whole < least) {
        small.set(chunk, length)
        length = whole
        this.#body.recycle?.(chunk)
      } else {
        const bytes = Buffer.concat([small.subarray(0, length), chunk], whole)
        length = 0
        this.#body.recycle?.(chunk)
        yield { bytes, lent: false }
      }
    }
    if (length > 0) yield { bytes: small.subarray(0, length), lent: false }
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

  #track({ bytes, lent }: Piece): Buffer {
    // a view of its own, by which the chunk is known again
    const view = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength)
    chunksOnTheirWay.set(view, () => {
      try {
        if (lent) this.#body.recycle?.(bytes)
        this.#onSent?.(bytes.byteLength)
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
