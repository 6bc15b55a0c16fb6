import type { FileHandle } from 'node:fs/promises'
import { Readable } from 'node:stream'
import { type ByteRange, destroyOnAbort, type ObjectStream, VarveError } from '@varve/core'
import { fileCall } from './file-call.ts'
import { localError } from './local-error.ts'

const CHUNK_SIZE = 1024 * 1024

/**
 * The bytes of an open file as a stream, which owns the file from here on. Unlike a stream of `node:fs` it
 * fails when the file ends before the range does.
 */
export class FileStream extends Readable implements ObjectStream {
  readonly #file: FileHandle
  readonly #path: string
  readonly #end: number
  readonly #signal: AbortSignal | undefined
  readonly #lent = new WeakSet<ArrayBufferLike>()
  readonly #free: Buffer[] = []
  #position: number

  constructor(file: FileHandle, path: string, range: ByteRange, signal?: AbortSignal) {
    super({ highWaterMark: CHUNK_SIZE }) // one chunk waits while the next is read: none are joined, which copies
    this.#file = file
    this.#path = path
    this.#position = range.start
    this.#end = range.end
    this.#signal = signal
    destroyOnAbort(this, signal)
  }

  override _read(): void {
    this.#readChunk().then(
      chunk => this.push(chunk),
      error => this.destroy(localError(error, 'Reading', this.#path)),
    )
  }

  recycle(chunk: Uint8Array): void {
    const { buffer } = chunk
    if (!this.#lent.delete(buffer)) return // not ours, or given back before
    this.#free.push(Buffer.from(buffer))
  }

  async readInto(memory: Uint8Array): Promise<number> {
    try {
      return await this.#read(memory)
    } catch (error) {
      throw localError(error, 'Reading', this.#path)
    }
  }

  async #readChunk(): Promise<Uint8Array | null> {
    if (this.#position >= this.#end) return null
    const memory = this.#free.pop() ?? Buffer.allocUnsafeSlow(CHUNK_SIZE)
    const length = await this.#read(memory)
    this.#lent.add(memory.buffer)
    return memory.subarray(0, length)
  }

  /** The next bytes, as many as come at once: none at the end only. */
  async #read(memory: Uint8Array): Promise<number> {
    const length = Math.min(memory.byteLength, this.#end - this.#position)
    if (length <= 0) return 0
    const read = () => this.#file.read(memory, 0, length, this.#position)
    const { bytesRead } = await fileCall(read, this.#signal)
    if (bytesRead === 0) {
      throw new VarveError(
        'STORAGE_FAILED',
        `${this.#path} ended after ${this.#position} bytes while it was read; ${this.#end} were expected. Was it changed on the storage?`,
        { context: { path: this.#path, position: this.#position, end: this.#end } },
      )
    }
    this.#position += bytesRead
    return bytesRead
  }

  override _destroy(error: Error | null, done: (error?: Error | null) => void): void {
    // Not awaited: it waits for a read that a hanging mount may never answer. Closing what was only read
    // tells nothing of the bytes.
    fileCall(() => this.#file.close()).catch(() => undefined)
    done(error)
  }
}
