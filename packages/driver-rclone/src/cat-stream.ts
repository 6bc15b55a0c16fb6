import { Readable } from 'node:stream'
import { destroyOnAbort, VarveError } from '@varve/core'
import type { RcloneExit, RcloneProcess } from './rclone-process.ts'

/** Options of {@link CatStream}. */
export interface CatStreamOptions {
  /** What is read, for messages. */
  target: string
  /** How many bytes there should be. */
  length: number
  signal: AbortSignal | undefined
  /** The error of an rclone that failed. */
  toError: (exit: RcloneExit) => Error
}

/**
 * What an `rclone cat` prints, which this stream owns. It ends when rclone has ended well and has given as many
 * bytes as there should be, and fails otherwise: never a short end.
 */
export class CatStream extends Readable {
  readonly #process: RcloneProcess
  readonly #options: CatStreamOptions
  #hold: Disposable | undefined
  #received = 0

  constructor(process: RcloneProcess, options: CatStreamOptions) {
    super({ highWaterMark: 1024 * 1024 })
    this.#process = process
    this.#options = options
    const { stdout } = process
    stdout.on('data', (chunk: Buffer) => {
      process.watch.progress()
      this.#received += chunk.byteLength
      if (this.#received > options.length) this.destroy(this.#changed())
      else if (!this.push(chunk)) this.#pause()
    })
    stdout.on('error', () => undefined) // its exit tells why
    const ended = new Promise<void>(resolve => stdout.once('close', resolve))
    process.exited.then(async exit => {
      if (exit.exitCode === 0) await ended // the end of what it printed may still wait for who reads this
      this.#finish(exit)
    })
    destroyOnAbort(this, options.signal)
  }

  override _read(): void {
    this.#hold?.[Symbol.dispose]()
    this.#hold = undefined
    this.#process.stdout.resume()
  }

  override _destroy(error: Error | null, done: (error?: Error | null) => void): void {
    this.#process.stop(new VarveError('ABORTED', 'The download was left.'))
    // not awaited: rclone may take a while to end, and what was only read needs no cleaning up
    done(error)
  }

  #pause(): void {
    this.#process.stdout.pause()
    this.#hold ??= this.#process.watch.hold() // whoever reads this is slow, not the server
  }

  #finish(exit: RcloneExit): void {
    if (this.destroyed) return
    if (this.#process.stopped) this.destroy(this.#process.stopped)
    else if (exit.exitCode !== 0) this.destroy(this.#options.toError(exit))
    else if (this.#received !== this.#options.length) this.destroy(this.#changed())
    else this.push(null)
  }

  #changed(): VarveError {
    const { target, length } = this.#options
    return new VarveError(
      'STORAGE_FAILED',
      `${target} gave ${this.#received} bytes where ${length} were expected. Was it changed on the storage while it was read?`,
      { context: { target, received: this.#received, expected: length } },
    )
  }
}
