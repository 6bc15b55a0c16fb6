import { Readable } from 'node:stream'
import { buffer } from 'node:stream/consumers'
import { VarveError } from '../src/errors.ts'
import {
  type ByteRange,
  type DriverCapabilities,
  type GetOptions,
  type ObjectStream,
  type StorageDriver,
  type StorageHealth,
  type StoredObject,
  toUploadBody,
  type UploadBody,
} from '../src/storage.ts'

/** How a {@link MemoryStorage} behaves. */
export interface MemoryStorageOptions {
  /** Bytes in each chunk of a download. Default: 64 KiB. */
  chunkSize?: number
  /** Whether it can begin a download anywhere. Default: true. */
  rangeRead?: boolean
  /** Whether downloads also read right into the caller's memory. Default: false. */
  direct?: boolean
  /** Is asked before every chunk of a download: what it throws, the download fails with. `end` ends it. */
  fault?: (key: string, offset: number) => 'end' | undefined
}

/** A storage in memory that keeps a record of what it was asked for. */
export class MemoryStorage implements StorageDriver {
  readonly type = 'memory'
  readonly location = 'memory'
  readonly capabilities: DriverCapabilities
  readonly objects = new Map<string, Buffer>()
  /** Every download, in its order. */
  readonly downloads: { readonly key: string; readonly range: ByteRange; sent: number }[] = []
  readonly #options: MemoryStorageOptions
  /** Memory of failed reads, which may still write to it. */
  readonly #failed: Uint8Array[] = []

  constructor(options: MemoryStorageOptions = {}) {
    this.#options = options
    const { rangeRead = true } = options
    this.capabilities = { rangeRead, atomicPublish: true, resume: false, parallelParts: false }
  }

  async put(key: string, body: UploadBody | Readable): Promise<StoredObject> {
    const bytes = await buffer(toUploadBody(body).open())
    this.objects.set(key, bytes)
    return { key, size: bytes.length }
  }

  async get(key: string, { range, signal }: GetOptions = {}): Promise<ObjectStream> {
    signal?.throwIfAborted()
    const object = this.objects.get(key)
    if (!object) throw new VarveError('OBJECT_NOT_FOUND', `There is no ${key}.`, { context: { key } })
    const { chunkSize = 64 * 1024, fault, direct = false } = this.#options
    const { start, end } = range ?? { start: 0, end: object.length }
    const download = { key, range: { start, end }, sent: 0 }
    this.downloads.push(download)
    async function* chunks(bytes: Buffer): AsyncGenerator<Buffer> {
      for (let at = start; at < Math.min(end, bytes.length); at += chunkSize) {
        if (fault?.(key, at) === 'end') return
        const chunk = Buffer.allocUnsafeSlow(Math.min(chunkSize, end - at, bytes.length - at))
        chunk.set(bytes.subarray(at, at + chunk.length))
        download.sent += chunk.length
        yield chunk
      }
    }
    const stream = Readable.from(chunks(object), { highWaterMark: 1, ...(signal && { signal }) })
    // What is given back is overwritten at once, so that a late use of it is seen.
    const recycle = (chunk: Uint8Array) => void chunk.fill(0xee)
    if (!direct) return Object.assign(stream, { recycle })
    let at = start
    const readInto = async (memory: Uint8Array): Promise<number> => {
      try {
        if (fault?.(key, at) === 'end') return 0
      } catch (error) {
        this.#failed.push(memory)
        throw error
      }
      const part = object.subarray(at, Math.min(end, at + Math.min(chunkSize, memory.length)))
      memory.set(part)
      at += part.length
      download.sent += part.length
      for (const late of this.#failed) late.fill(0xee) // whoever uses such memory again sees it
      return part.length
    }
    return Object.assign(stream, { recycle, readInto })
  }

  async stat(key: string): Promise<StoredObject | undefined> {
    const object = this.objects.get(key)
    return object && { key, size: object.length }
  }

  async *list(prefix: string): AsyncIterable<StoredObject> {
    for (const [key, { length: size }] of this.objects) if (key.startsWith(prefix)) yield { key, size }
  }

  async delete(key: string): Promise<void> {
    this.objects.delete(key)
  }

  async check(): Promise<StorageHealth> {
    return { ok: true, checks: [], durationMs: 0 }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.objects.clear()
  }

  /** How often each block of the object was in a download's range. */
  timesFetched(key: string, blockSize: number): number[] {
    const times = new Array<number>(Math.ceil((this.objects.get(key)?.length ?? 0) / blockSize)).fill(0)
    for (const { key: downloaded, range } of this.downloads) {
      if (downloaded !== key) continue
      for (let block = Math.floor(range.start / blockSize); block * blockSize < range.end; block++)
        times[block] = (times[block] ?? 0) + 1
    }
    return times
  }
}
