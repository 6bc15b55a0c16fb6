import { Readable } from 'node:stream'
import {
  abortError,
  assertKey,
  assertRange,
  type CallOptions,
  checkStorage,
  type GetOptions,
  type PutOptions,
  readUpload,
  type StorageDriver,
  type StorageHealth,
  type StoredObject,
  toUploadBody,
  type UploadBody,
  VarveError,
} from '@varve/core'

const CHUNK_SIZE = 1024 * 1024

/** A storage in the memory of this process: the smallest driver that keeps the whole contract. */
export class MemoryDriver implements StorageDriver {
  readonly type = 'memory'
  readonly location = 'this process'
  readonly capabilities = {
    rangeRead: true,
    atomicPublish: true,
    resume: false,
    parallelParts: false,
  }
  /** What is stored, by key. */
  readonly objects = new Map<string, { bytes: Buffer; modifiedAt: Date }>()

  async put(key: string, body: UploadBody | Readable, options: PutOptions = {}): Promise<StoredObject> {
    try {
      assertKey(key)
      const upload = toUploadBody(body)
      const chunks: Buffer[] = []
      let size = 0
      // ends normally only after exactly the bytes that the body had promised
      for await (const chunk of readUpload(upload, { ...options, key })) {
        chunks.push(Buffer.from(chunk)) // a copy, since the body uses the chunk's memory again
        upload.recycle?.(chunk)
        size += chunk.byteLength
        options.onProgress?.(size)
      }
      this.objects.set(key, { bytes: Buffer.concat(chunks), modifiedAt: new Date() })
      return this.#describe(key, this.#object(key))
    } finally {
      if (body instanceof Readable) body.destroy()
    }
  }

  async get(key: string, { range, signal }: GetOptions = {}): Promise<Readable> {
    begin(key, signal)
    if (range) assertRange(range)
    const { bytes } = this.#object(key)
    const part = range ? bytes.subarray(range.start, range.end) : bytes
    const stream = Readable.from(slices(part), { objectMode: false })
    const giveUp = () => signal && stream.destroy(abortError(signal))
    signal?.addEventListener('abort', giveUp, { once: true })
    stream.once('close', () => signal?.removeEventListener('abort', giveUp))
    return stream
  }

  async stat(key: string, { signal }: CallOptions = {}): Promise<StoredObject | undefined> {
    begin(key, signal)
    const object = this.objects.get(key)
    return object && this.#describe(key, object)
  }

  async *list(prefix: string, { signal }: CallOptions = {}): AsyncGenerator<StoredObject> {
    assertKey(prefix, 'prefix')
    for (const [key, object] of this.objects) {
      if (signal?.aborted) throw abortError(signal)
      if (key.startsWith(prefix)) yield this.#describe(key, object)
    }
  }

  async delete(key: string, { signal }: CallOptions = {}): Promise<void> {
    begin(key, signal)
    this.objects.delete(key)
  }

  async check(options: CallOptions = {}): Promise<StorageHealth> {
    return checkStorage(this, { ...options, connect: async () => ({}) })
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.objects.clear()
  }

  #object(key: string): { bytes: Buffer; modifiedAt: Date } {
    const object = this.objects.get(key)
    if (object) return object
    throw new VarveError('OBJECT_NOT_FOUND', `There is no object ${key}.`, { context: { key } })
  }

  #describe(key: string, { bytes, modifiedAt }: { bytes: Buffer; modifiedAt: Date }): StoredObject {
    return { key, size: bytes.byteLength, modifiedAt }
  }
}

function begin(key: string, signal: AbortSignal | undefined): void {
  assertKey(key)
  if (signal?.aborted) throw abortError(signal)
}

function* slices(bytes: Buffer): Generator<Buffer> {
  for (let start = 0; start < bytes.byteLength; start += CHUNK_SIZE) {
    yield bytes.subarray(start, start + CHUNK_SIZE)
  }
}
