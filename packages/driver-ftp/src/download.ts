import { Readable } from 'node:stream'
import { destroyOnAbort, type ObjectStream, VarveError } from '@varve/core'
import { ftpError, timeoutError } from './ftp-error.ts'
import type { FtpSettings } from './ftp-options.ts'
import type { Transfer } from './transfer.ts'

/** What a {@link Download} is to give. */
export interface DownloadOptions {
  readonly key: string
  /** How many bytes. */
  readonly length: number
  /** Whether they are the last ones of the object, so that nothing may come after them. */
  readonly toEnd: boolean
  readonly settings: FtpSettings
  readonly signal: AbortSignal | undefined
  /** Called when the connection can be used for something else, or is closed. */
  readonly onDone: () => void
}

/** The bytes of an object from a transfer, which it owns. The server is timed only while the reader waits for it. */
export class Download extends Readable implements ObjectStream {
  readonly #transfer: Transfer
  readonly #options: DownloadOptions
  readonly #timer: NodeJS.Timeout
  #left: number
  #flowing = false

  constructor(transfer: Transfer, options: DownloadOptions) {
    super({ highWaterMark: 256 * 1024 })
    const { settings, signal } = options
    const { socket } = transfer
    this.#transfer = transfer
    this.#options = options
    this.#left = options.length
    this.#timer = setTimeout(() => {
      if (!this.#flowing) this.#timer.refresh()
      else
        this.destroy(
          timeoutError(`the download of ${options.key} stands still`, settings.timeoutMs, settings),
        )
    }, settings.timeoutMs)
    socket.on('data', chunk => this.#take(chunk))
    socket.pause()
    socket.once('end', () => this.#ended())
    socket.once('close', () => this.#ended())
    // an empty file may have ended, and be closed, before the server's reply was here
    if (socket.readableEnded || socket.closed) this.#ended()
    destroyOnAbort(this, signal)
  }

  override _read(): void {
    if (!this.#flowing) this.#timer.refresh()
    this.#flowing = true
    this.#transfer.socket.resume()
  }

  #take(chunk: Buffer): void {
    if (this.destroyed || this.readableEnded) return
    const { toEnd, key, settings } = this.#options
    this.#timer.refresh()
    if (chunk.byteLength > this.#left && toEnd) {
      this.destroy(changed(key, settings, 'is longer than it was'))
      return
    }
    const taken = chunk.byteLength > this.#left ? chunk.subarray(0, this.#left) : chunk
    this.#left -= taken.byteLength
    if (!this.push(taken)) {
      this.#flowing = false
      this.#transfer.socket.pause()
    }
    if (this.#left === 0 && !toEnd) this.push(null)
  }

  #ended(): void {
    if (this.destroyed || this.readableEnded) return
    if (this.#left === 0) this.push(null)
    else this.#endedEarly()
  }

  /** Fails with what the server says of it, where it says anything. */
  #endedEarly(): void {
    const { key, settings } = this.#options
    this.#transfer.abandon().then(
      said =>
        this.destroy(
          said ? ftpError(said, `Reading ${key}`, settings) : changed(key, settings, 'ended early'),
        ),
      error => this.destroy(error),
    )
  }

  override _destroy(error: Error | null, done: (error?: Error | null) => void): void {
    clearTimeout(this.#timer)
    this.#transfer.abandon().finally(this.#options.onDone)
    done(error)
  }
}

function changed(key: string, { location }: FtpSettings, what: string): VarveError {
  return new VarveError(
    'STORAGE_FAILED',
    `${key} ${what} while it was read from ${location}. Check the connection, and whether it was changed on the storage.`,
    { context: { key, location }, retryable: true },
  )
}
