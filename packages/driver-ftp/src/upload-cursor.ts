import { readUpload, type UploadBody } from '@varve/core'

/**
 * The bytes of a body at a position that survives a broken transfer: the source is read on by the next one where
 * nothing was lost, and opened anew at an earlier position where it can be.
 */
export class UploadCursor implements Disposable {
  /** How many bytes of the body have been taken. */
  position = 0
  /** The next chunk, once it is there. */
  chunk: Uint8Array | undefined
  /** Whether the source has ended, with as many bytes as it had promised. */
  ended = false
  /** Why the source gives no more, where it failed. */
  failure: { readonly error: unknown } | undefined
  /** Called when one of the above has changed. */
  onChange: () => void = () => undefined
  readonly #body: UploadBody
  readonly #key: string
  readonly #signal: AbortSignal | undefined
  #reading: { readonly chunks: AsyncGenerator<Uint8Array>; readonly end: AbortController } | undefined
  #asked = false

  constructor(body: UploadBody, key: string, signal: AbortSignal | undefined) {
    this.#body = body
    this.#key = key
    this.#signal = signal
  }

  /** Whether the body can be opened at any position. */
  get seekable(): boolean {
    return this.#body.replayable && this.#body.size !== undefined
  }

  /** Whether the body can be opened again from its beginning. */
  get replayable(): boolean {
    return this.#body.replayable || this.#reading === undefined
  }

  /** Asks for the next chunk, unless it is there or is asked for already. */
  ask(): void {
    if (this.#asked || this.chunk || this.ended || this.failure) return
    this.#asked = true
    this.#reading ??= this.#open()
    const reading = this.#reading
    reading.chunks.next().then(
      ({ value, done }) => {
        if (reading !== this.#reading) return
        this.#asked = false
        if (done) this.ended = true
        else this.chunk = value
        this.onChange()
      },
      error => {
        if (reading !== this.#reading) return
        this.failure = { error }
        this.onChange()
      },
    )
  }

  /** Takes the chunk that is there. */
  take(): Uint8Array | undefined {
    const { chunk } = this
    this.chunk = undefined
    this.position += chunk?.byteLength ?? 0
    return chunk
  }

  /** Goes to another position. What is there of the source is dropped. */
  seek(position: number): void {
    this[Symbol.dispose]()
    this.#reading = undefined
    this.#asked = false
    this.chunk = undefined
    this.ended = false
    this.position = position
  }

  /** Ends the source, also one that stalls. */
  [Symbol.dispose](): void {
    if (!this.#reading) return
    const { chunks, end } = this.#reading
    end.abort(new Error('the upload has ended'))
    chunks.return(undefined).catch(() => undefined)
  }

  #open(): { chunks: AsyncGenerator<Uint8Array>; end: AbortController } {
    const end = new AbortController()
    const signal = this.#signal ? AbortSignal.any([this.#signal, end.signal]) : end.signal
    const { size } = this.#body
    const range = this.position > 0 && size !== undefined ? { start: this.position, end: size } : undefined
    const chunks = readUpload(this.#body, { key: this.#key, signal, ...(range && { range }) })
    return { chunks, end }
  }
}
