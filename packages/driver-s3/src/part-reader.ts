import { Readable } from 'node:stream'
import { type ByteRange, readUpload, type UploadBody } from '@varve/core'

/** Parts are kept in blocks of this size, in bytes, which serve parts of any size one after the other. */
const BLOCK_SIZE = 1024 * 1024

/** A part of a stream, in memory. */
export interface Part {
  /** Its bytes, as often as they are needed. */
  readonly body: UploadBody
  readonly length: number
  readonly blocks: readonly Buffer[]
  /** Whether the source has ended with it. */
  readonly last: boolean
}

/** Options of {@link PartReader}. */
export interface PartReaderOptions {
  /** The key that is uploaded, for messages. */
  key: string
  /** Ends the reading with `ABORTED`. */
  signal: AbortSignal
  /** The size of a part by its number, from 1 on. */
  sizeOf: (number: number) => number
  /** Resolves when there is memory for so many bytes. */
  room: (bytes: number) => Promise<void>
}

/** Reads a body into parts of given sizes. The memory of a part that was sent takes a later one, whatever its size. */
export class PartReader {
  readonly #body: UploadBody
  readonly #source: AsyncGenerator<Uint8Array>
  readonly #options: PartReaderOptions
  readonly #free: Buffer[] = []
  #chunk: Uint8Array | undefined
  #taken = 0

  constructor(body: UploadBody, options: PartReaderOptions) {
    const { key, signal } = options
    this.#body = body
    this.#source = readUpload(body, { key, signal })
    this.#options = options
  }

  /** The next part; one of no bytes at the end of the source. */
  async next(number: number): Promise<Part> {
    if (!(await this.#fetch())) return { body: bodyOf([], 0), blocks: [], length: 0, last: true }
    const size = Math.min(this.#options.sizeOf(number), this.#body.size ?? Number.POSITIVE_INFINITY)
    await this.#options.room(size)
    const blocks: Buffer[] = []
    let length = 0
    while (length < size && (await this.#fetch())) length += this.#copy(blocks, length, size)
    const last = length < size || !(await this.#fetch())
    return { body: bodyOf(blocks, length), blocks, length, last }
  }

  /** Takes the memory of a part back that has been sent. */
  recycle({ blocks }: Part): void {
    this.#free.push(...blocks)
  }

  async end(): Promise<void> {
    await this.#source.return(undefined)
  }

  /** Sees to a chunk that has bytes left; false at the end of the source. */
  async #fetch(): Promise<boolean> {
    if (this.#chunk) return true
    const { value, done } = await this.#source.next()
    if (done) return false
    this.#chunk = value
    this.#taken = 0
    return true
  }

  /** Copies from the chunk into the last block, or a new one, and returns how many bytes. */
  #copy(blocks: Buffer[], length: number, size: number): number {
    const chunk = this.#chunk ?? Buffer.alloc(0)
    const at = length % BLOCK_SIZE
    if (at === 0) blocks.push(this.#free.pop() ?? Buffer.allocUnsafeSlow(BLOCK_SIZE))
    const bytes = Math.min(size - length, BLOCK_SIZE - at, chunk.byteLength - this.#taken)
    blocks.at(-1)?.set(chunk.subarray(this.#taken, this.#taken + bytes), at)
    this.#taken += bytes
    if (this.#taken === chunk.byteLength) {
      this.#body.recycle?.(chunk)
      this.#chunk = undefined
    }
    return bytes
  }
}

function bodyOf(blocks: readonly Buffer[], size: number): UploadBody {
  return {
    size,
    replayable: true,
    open: ({ start, end }: ByteRange = { start: 0, end: size }) =>
      Readable.from(rangeOf(blocks, start, end), { objectMode: false, highWaterMark: 1 }),
  }
}

function* rangeOf(blocks: readonly Buffer[], start: number, end: number): Generator<Buffer> {
  for (let at = start; at < end; ) {
    const within = at % BLOCK_SIZE
    const bytes = Math.min(end - at, BLOCK_SIZE - within)
    yield (blocks[(at - within) / BLOCK_SIZE] ?? Buffer.alloc(0)).subarray(within, within + bytes)
    at += bytes
  }
}
