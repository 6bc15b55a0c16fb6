import { Readable } from 'node:stream'
import type { ByteRange, UploadBody } from '@varve/core'
import { fillPattern } from './pattern.ts'

/** Options of {@link PatternBody}. */
export interface PatternBodyOptions {
  /** In bytes. */
  size: number
  /** Tells bodies apart. Default: 0. */
  seed?: number
  /** The size of its chunks in bytes. Default: 256 KiB. */
  chunkSize?: number
  /** Whether it may be opened more than once, and with a range. Default: true. */
  replayable?: boolean
}

/**
 * A body of pattern bytes that is as hard on a driver as the contract allows: memory that is given back by
 * `recycle` is overwritten at once and used again.
 */
export class PatternBody implements UploadBody {
  readonly size: number
  readonly replayable: boolean
  /** The seed of its pattern. */
  readonly seed: number
  /** What the driver did against the contract, in words. */
  readonly faults: string[] = []
  /** How many chunks it had to find memory for, since those given back were not enough. */
  allocations = 0
  readonly #chunkSize: number
  readonly #lent = new Set<ArrayBufferLike>()
  readonly #free: Uint8Array[] = []
  #opened = 0

  constructor({ size, seed = 0, chunkSize = 256 * 1024, replayable = true }: PatternBodyOptions) {
    this.size = size
    this.seed = seed
    this.replayable = replayable
    this.#chunkSize = chunkSize
  }

  open(range: ByteRange = { start: 0, end: this.size }): Readable {
    this.#opened++
    if (!this.replayable && (this.#opened > 1 || range.start !== 0 || range.end !== this.size)) {
      this.faults.push('opened a body again, or with a range, that opens once and as a whole')
    }
    let offset = range.start
    const body = this
    // an object stream, so that a chunk arrives as the very one that was made
    return new Readable({
      objectMode: true,
      highWaterMark: 1,
      read() {
        if (offset >= range.end) {
          this.push(null)
          return
        }
        const chunk = body.#lend(Math.min(body.#chunkSize, range.end - offset))
        fillPattern(chunk, body.seed, offset)
        offset += chunk.byteLength
        this.push(chunk)
      },
    })
  }

  recycle(chunk: Uint8Array): void {
    if (!this.#lent.delete(chunk.buffer)) {
      this.faults.push('gave a chunk back twice, or one that was not of this body')
      return
    }
    const memory = new Uint8Array(chunk.buffer)
    memory.fill(0xee)
    this.#free.push(memory)
  }

  #lend(length: number): Uint8Array {
    const memory = this.#free.pop() ?? this.#allocate()
    this.#lent.add(memory.buffer)
    return memory.subarray(0, length)
  }

  #allocate(): Uint8Array {
    this.allocations++
    return new Uint8Array(this.#chunkSize)
  }
}
