import { Readable } from 'node:stream'
import { type ByteRange, destroyOnAbort, isVarveError, type ObjectStream, VarveError } from '@varve/core'
import { backOff, isTransient, statusOf } from './retrying.ts'

/** Options of {@link DownloadStream}. */
export interface DownloadStreamOptions {
  /** The bytes that it ends with. */
  readonly range: ByteRange
  /** The bytes from `start` on, of the same object as before. */
  readonly open: (start: number) => Promise<Readable>
  /** How often in a row a connection may break without a byte. */
  readonly retries: number
  readonly error: (error: unknown) => VarveError
  readonly signal?: AbortSignal | undefined
}

/** The bytes of an object; goes on where a connection breaks off, and never ends early. */
export class DownloadStream extends Readable implements ObjectStream {
  readonly #options: DownloadStreamOptions
  #source: Readable | undefined
  #position: number
  #failures = 0

  constructor(first: Readable, options: DownloadStreamOptions) {
    super({ highWaterMark: 256 * 1024 })
    this.#options = options
    this.#position = options.range.start
    this.#attach(first)
    destroyOnAbort(this, options.signal)
  }

  override _read(): void {
    this.#source?.resume()
  }

  override _destroy(error: Error | null, done: (error?: Error | null) => void): void {
    this.#source?.destroy()
    done(error)
  }

  #attach(source: Readable): void {
    this.#source = source
    let over = false
    const finish = (error?: unknown) => {
      if (over) return
      over = true
      this.#source = undefined
      source.destroy()
      if (this.destroyed) return
      // all that was asked for has come, whatever becomes of the connection
      if (this.#position >= this.#options.range.end) this.push(null)
      else this.#goOn(error ?? cutOff())
    }
    source.on('data', (chunk: Buffer) => {
      if (over) return
      this.#position += chunk.byteLength
      this.#failures = 0
      if (this.#position > this.#options.range.end) {
        over = true
        source.destroy()
        this.destroy(this.#options.error(new Error('the storage sent more than the object has')))
      } else if (!this.push(chunk)) source.pause()
    })
    source.on('end', () => finish())
    source.on('error', finish)
    source.on('close', () => finish())
  }

  #goOn(error: unknown): void {
    this.#reopen(error).then(
      source => (this.destroyed ? source.destroy() : this.#attach(source)),
      failure => this.destroy(isVarveError(failure) ? failure : this.#options.error(failure)),
    )
  }

  async #reopen(cause: unknown): Promise<Readable> {
    const { open, retries, signal } = this.#options
    for (let error = cause; ; ) {
      if (!isTransient(error) || this.#failures >= retries || this.destroyed) throw error
      await backOff(this.#failures++, signal)
      try {
        return await open(this.#position)
      } catch (failure) {
        if (statusOf(failure) === 412 || statusOf(failure) === 404) throw objectChanged(failure)
        error = failure
      }
    }
  }
}

function cutOff(): Error {
  return Object.assign(new Error('the connection ended early'), { code: 'ECONNRESET' })
}

/** The error of a download that broke off and cannot go on, since its object is another one or gone. */
export function objectChanged(cause?: unknown): VarveError {
  const message = 'The object was replaced or deleted while it was read. Read it again.'
  return new VarveError('STORAGE_FAILED', message, { cause, retryable: true })
}
