import { Readable } from 'node:stream'
import { DeleteObjectCommand, GetObjectCommand } from '@aws-sdk/client-s3'
import {
  abortError,
  assertKey,
  assertRange,
  type ByteRange,
  type CallOptions,
  type CleanUpOptions,
  checkStorage,
  type DriverCapabilities,
  failsWithProgress,
  type GetOptions,
  type ObjectStream,
  objectNotFound,
  type PutOptions,
  removeEach,
  type StorageDriver,
  type StorageHealth,
  type StoredObject,
  toUploadBody,
  type UploadBody,
  VarveError,
} from '@varve/core'
import { Bucket } from './bucket.ts'
import { DownloadStream, objectChanged } from './download-stream.ts'
import { abortBy } from './grace.ts'
import { listObjects } from './list-objects.ts'
import { removeUpload } from './multipart-upload.ts'
import { largestObject, largestStream } from './part-plan.ts'
import { putObject } from './put-object.ts'
import { statusOf, withRetries } from './retrying.ts'
import { type S3DriverOptions, settingsOf } from './s3-options.ts'
import { foundUploads, hasPartsSince } from './stale-uploads.ts'
import { uploadInParts, uploadStream } from './upload-parts.ts'

const LONGEST_NAME = 1024

/**
 * Keeps backups in a bucket of S3 or of a storage that is compatible with it.
 *
 * A large object is sent in several parts at once, each read from the body on its own, so that a part which
 * fails is read again rather than kept in memory. It is seen when its last part is there, and so is an upload
 * whose answer was lost: objects carry the id of their upload in the metadata `varve-upload`.
 */
export class S3Driver implements StorageDriver {
  readonly type = 's3'
  readonly location: string
  readonly capabilities: DriverCapabilities
  readonly #bucket: Bucket
  readonly #options: S3DriverOptions

  /** @throws INVALID_CONFIG for an option that is wrong; nothing is contacted */
  constructor(options: S3DriverOptions) {
    const settings = settingsOf(options)
    this.#options = { ...options }
    this.#bucket = new Bucket(settings)
    this.location = this.#bucket.location
    this.capabilities = {
      rangeRead: true,
      atomicPublish: true,
      resume: true,
      parallelParts: true,
      maxObjectSize: largestObject(settings),
      maxStreamSize: largestStream(settings, undefined),
    }
  }

  async put(key: string, body: UploadBody | Readable, options: PutOptions = {}): Promise<StoredObject> {
    const { signal } = options
    try {
      this.#assertKey(key)
      if (signal?.aborted) throw abortError(signal)
      return await failsWithProgress(options, async ({ onProgress }) => {
        const upload = { bucket: this.#bucket, key, signal, onProgress }
        return { key, size: await this.#store(upload, toUploadBody(body)) }
      })
    } finally {
      if (body instanceof Readable) body.destroy()
    }
  }

  async get(key: string, { range, signal }: GetOptions = {}): Promise<ObjectStream> {
    this.#assertKey(key)
    if (range) assertRange(range)
    if (signal?.aborted) throw abortError(signal)
    if (range && range.start === range.end) {
      if ((await this.stat(key, signal ? { signal } : {})) === undefined)
        throw objectNotFound(key, this.location)
      return Readable.from([], { objectMode: false })
    }
    const action = { doing: `Reading ${key}`, permission: 's3:GetObject' }
    const { retries } = this.#bucket.settings
    try {
      const first = await withRetries(() => this.#open(key, range, { signal }), { retries, signal })
      return new DownloadStream(first.stream, {
        range: first.range,
        open: async start => {
          if (first.etag === undefined) throw this.#unnamed(key)
          const rest = { start, end: first.range.end }
          const next = await this.#open(key, rest, { signal, etag: first.etag })
          if (next.etag === first.etag && next.size === first.size) return next.stream
          next.stream.destroy()
          throw objectChanged() // not every storage looks at If-Match
        },
        retries,
        error: error => this.#bucket.error(error, action),
        signal,
      })
    } catch (error) {
      if (statusOf(error) === 416) return Readable.from([], { objectMode: false }) // all of it is past the end
      if (error instanceof Error && error.name === 'NoSuchKey') throw objectNotFound(key, this.location)
      throw this.#bucket.error(error, action)
    }
  }

  async stat(key: string, { signal }: CallOptions = {}): Promise<StoredObject | undefined> {
    this.#assertKey(key)
    const head = await this.#bucket.head(key, { signal })
    return head && { key, size: head.size, ...(head.modifiedAt && { modifiedAt: head.modifiedAt }) }
  }

  async *list(prefix: string, { signal }: CallOptions = {}): AsyncGenerator<StoredObject> {
    assertKey(prefix, 'prefix')
    for await (const object of listObjects(this.#bucket, prefix, { signal })) {
      if (signal?.aborted) throw abortError(signal)
      yield object
    }
    if (signal?.aborted) throw abortError(signal)
  }

  async delete(key: string, { signal }: CallOptions = {}): Promise<void> {
    this.#assertKey(key)
    const action = { doing: `Deleting ${key}`, permission: 's3:DeleteObject' }
    const command = new DeleteObjectCommand(this.#bucket.at(key))
    await this.#bucket.call(
      action,
      async options => {
        try {
          await this.#bucket.client.send(command, options)
        } catch (error) {
          if (!(error instanceof Error && error.name === 'NoSuchKey')) throw error // some servers say so
        }
      },
      { signal },
    )
  }

  async check({ signal }: CallOptions = {}): Promise<StorageHealth> {
    const connect = async () => {
      await this.#bucket.probe({ retries: 0, signal })
      return {}
    }
    const call = signal ? { signal } : {}
    const health = await checkStorage(this, { connect, ...call })
    const isOpen =
      this.#options.checksums === undefined && this.#bucket.settings.checksums === 'WHEN_REQUIRED'
    if (!health.ok || !isOpen || !(await this.#takesChecksums(call))) return health
    return {
      ...health,
      notice:
        'The server takes uploads with a checksum, by which it finds what is damaged on the way. Set checksums to WHEN_SUPPORTED.',
    }
  }

  async cleanUp({ olderThan, signal }: CleanUpOptions): Promise<number> {
    return removeEach(foundUploads(this.#bucket, '', { signal }), async upload => {
      if (signal?.aborted) throw abortError(signal)
      if (upload.begunAt >= olderThan) return false
      if (await hasPartsSince(this.#bucket, upload, olderThan, { signal })) return false
      await removeUpload(this.#bucket, upload)
      return true
    })
  }

  /** Closes the connections. */
  async [Symbol.asyncDispose](): Promise<void> {
    this.#bucket[Symbol.dispose]()
  }

  /** Whether the storage takes uploads with a checksum, and gives back what was sent so. */
  async #takesChecksums(call: CallOptions): Promise<boolean> {
    await using other = new S3Driver({ ...this.#options, checksums: 'WHEN_SUPPORTED', retries: 0 })
    return (await checkStorage(other, { connect: async () => ({}), ...call })).ok
  }

  async #store(upload: Parameters<typeof putObject>[0], body: UploadBody): Promise<number> {
    const { size, replayable } = body
    const { maxObjectSize = Number.POSITIVE_INFINITY } = this.capabilities
    if (size !== undefined && size > maxObjectSize) {
      throw new VarveError(
        'UPLOAD_FAILED',
        `${upload.key} has ${size} bytes; the largest object of ${this.location} is ${maxObjectSize}. Raise maxParts as far as the provider allows, or keep it on another storage.`,
        { context: { key: upload.key, size, maxObjectSize } },
      )
    }
    if (size === undefined || !replayable) return uploadStream(upload, body)
    if (size <= this.#bucket.settings.partSize) await putObject(upload, body, size)
    else await uploadInParts(upload, body, size)
    return size
  }

  async #open(
    key: string,
    range: ByteRange | undefined,
    { signal, etag }: { signal: AbortSignal | undefined; etag?: string | undefined },
  ): Promise<{ stream: Readable; range: ByteRange; size: number; etag: string | undefined }> {
    const answer = await this.#bucket.client.send(
      new GetObjectCommand({
        ...this.#bucket.at(key),
        ...(range && { Range: `bytes=${range.start}-${range.end - 1}` }),
        ...(etag !== undefined && { IfMatch: etag }),
      }),
      abortBy(signal),
    )
    const { Body: stream, ContentLength: length, ContentRange: sent } = answer
    const given = range ? rangeOf(sent) : { start: 0, end: length ?? -1, size: length ?? -1 }
    if (
      !(stream instanceof Readable) ||
      given?.start !== (range?.start ?? 0) ||
      given.end !== Math.min(range?.end ?? given.end, given.size) ||
      given.end - given.start !== length
    ) {
      if (stream instanceof Readable) stream.destroy()
      throw new Error('the storage answered with something else than the bytes that were asked for')
    }
    return { stream, range: given, size: given.size, etag: answer.ETag }
  }

  #assertKey(key: string): void {
    assertKey(key)
    if (Buffer.byteLength(this.#bucket.settings.prefix + key) <= LONGEST_NAME) return
    throw new VarveError(
      'INVALID_KEY',
      `Not a storage key: ${JSON.stringify(key)} is longer than 1024 bytes with the path prefix before it.`,
      { context: { key } },
    )
  }

  /** The error of a download that broke off, and that nothing tells to be of the same object when it goes on. */
  #unnamed(key: string): VarveError {
    return new VarveError(
      'STORAGE_UNREACHABLE',
      `The connection was cut while ${key} was read. ${this.location} gives no ETag of it, so it cannot be read on from there: it may have been replaced. Read it again.`,
      { context: { key }, retryable: true },
    )
  }
}

/** What a Content-Range says; undefined where it does not say all. */
function rangeOf(sent: string | undefined): (ByteRange & { size: number }) | undefined {
  const [, first, last, size] = /^bytes (\d+)-(\d+)\/(\d+)$/.exec(sent ?? '') ?? []
  return last === undefined ? undefined : { start: Number(first), end: Number(last) + 1, size: Number(size) }
}
