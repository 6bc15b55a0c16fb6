import { Readable } from 'node:stream'
import { VarveError } from './errors.ts'

/** A half-open range of bytes: `start` is the first byte, `end` the first one after it. */
export interface ByteRange {
  readonly start: number
  readonly end: number
}

/**
 * Bytes to upload. A replayable body lets a driver retry, resume and work in parallel without
 * buffering anything.
 */
export interface UploadBody {
  /** The exact size in bytes, where it is known before the first byte. A body of another length is a failed upload. */
  readonly size?: number
  /** Whether {@link UploadBody.open} may be called more than once, and with a range. */
  readonly replayable: boolean
  /** The bytes, or those of `range`. An error of the stream is a failed upload. The opener destroys it. */
  open(range?: ByteRange): Readable
  /**
   * Optional: a driver that is done with a chunk it got from this body gives it back, so that its memory
   * is used again. A chunk given back must not be touched any more.
   */
  recycle?(chunk: Uint8Array): void
}

/** What a storage holds under one key. */
export interface StoredObject {
  /** The key, relative to the driver's prefix. */
  readonly key: string
  /** Size in bytes. */
  readonly size: number
  /** When it was last written, where the storage tells. */
  readonly modifiedAt?: Date
}

/** What a driver can do beyond the least that the contract asks for. */
export interface DriverCapabilities {
  /** `get` with a range fetches that range alone. Without it the driver reads and drops what comes before. */
  readonly rangeRead: boolean
  /** A new object appears under its key whole or not at all. */
  readonly atomicPublish: boolean
  /** A broken upload of a replayable body goes on where it broke off. */
  readonly resume: boolean
  /** A replayable body is uploaded in several parts at once. */
  readonly parallelParts: boolean
  /** The size of the largest object in bytes, where there is a limit. */
  readonly maxObjectSize?: number
}

/** Options of {@link StorageDriver.put}. */
export interface PutOptions {
  /** Gives the upload up; nothing of it is left behind. */
  signal?: AbortSignal
  /** Called with the bytes that have reached the storage so far; may go back after a retry. */
  onProgress?: (bytes: number) => void
}

/** Options of {@link StorageDriver.get}. */
export interface GetOptions {
  /** Only these bytes; cut off at the object's end. Default: all. */
  range?: ByteRange
  /** Ends the download: the stream fails with the signal's reason. */
  signal?: AbortSignal
}

/** Options of the calls that move no data. */
export interface CallOptions {
  /** Ends the call with the signal's reason. */
  signal?: AbortSignal
}

/** One thing that a storage was tried for. */
export interface StorageCheck {
  /** What was tried. */
  readonly name: 'connect' | 'write' | 'read' | 'list' | 'delete'
  /** Whether it worked. */
  readonly ok: boolean
  /** What went wrong and what to do, where it did not. */
  readonly message?: string
}

/** The outcome of {@link StorageDriver.check}. */
export interface StorageHealth {
  /** Whether every check passed. */
  readonly ok: boolean
  /** The checks in the order they were made; the ones after a failure are left out. */
  readonly checks: readonly StorageCheck[]
  /** Bytes that can still be written, where the storage tells. */
  readonly freeBytes?: number
  /** How long the checks took, in milliseconds. */
  readonly durationMs: number
}

/**
 * A place where backups are kept. What every driver promises:
 *
 * - Keys are `/`-separated names relative to the driver's prefix. A key that is absolute, empty or holds an
 *   empty, `.` or `..` name, a control character or a backslash is refused with `INVALID_KEY`.
 * - `put` resolves only when the object is whole and durable. Until then nothing is seen under the key, or
 *   the former object is; after a failure or an abort nothing is left behind.
 * - A source that fails, ends early or runs over its size is a failed upload, never a short object.
 * - Errors are {@link VarveError}s without secrets.
 *
 * `@varve/testkit` has the suite that every driver passes against a real server.
 */
export interface StorageDriver extends AsyncDisposable {
  /** The kind of storage, such as `local` or `s3`. */
  readonly type: string
  /** Where it is, for people: a path or an address with no secret in it. */
  readonly location: string
  /** What it can do beyond the least. */
  readonly capabilities: DriverCapabilities
  /** Stores an object, replacing one of the same key. */
  put(key: string, body: UploadBody | Readable, options?: PutOptions): Promise<StoredObject>
  /** Opens an object, or a range of it. `OBJECT_NOT_FOUND` where there is none. */
  get(key: string, options?: GetOptions): Promise<Readable>
  /** The object's size and time, or undefined where there is none. */
  stat(key: string, options?: CallOptions): Promise<StoredObject | undefined>
  /** All objects whose key begins with `prefix`, in no particular order; temporary ones of uploads are left out. */
  list(prefix: string, options?: CallOptions): AsyncIterable<StoredObject>
  /** Removes an object. One that is not there is no error. */
  delete(key: string, options?: CallOptions): Promise<void>
  /** Writes, reads back, lists and deletes a probe. Never throws for a storage that is not well: it says so. */
  check(options?: CallOptions): Promise<StorageHealth>
}

/** A replayable body of bytes that are in memory. */
export function bytesBody(bytes: Uint8Array): UploadBody {
  return {
    size: bytes.byteLength,
    replayable: true,
    open: range =>
      Readable.from([range ? bytes.subarray(range.start, range.end) : bytes], { objectMode: false }),
  }
}

/** Either form of {@link StorageDriver.put}'s body as an {@link UploadBody}; a stream is one that opens once. */
export function toUploadBody(body: UploadBody | Readable): UploadBody {
  if (!(body instanceof Readable)) return body
  let opened = false
  return {
    replayable: false,
    open(range) {
      if (opened || range)
        throw new VarveError('INVALID_ARGUMENT', 'A stream can be uploaded only once and as a whole.')
      opened = true
      return body
    },
  }
}

/** Refuses a key that is no plain relative path; see {@link StorageDriver}. An empty `prefix` of a listing is allowed. */
export function assertKey(key: string, what: 'key' | 'prefix' = 'key'): void {
  if (what === 'prefix' && key === '') return
  const names = key.split('/')
  if (what === 'prefix' && names.at(-1) === '') names.pop()
  const bad = names.some(name => name === '' || name === '.' || name === '..')
  // biome-ignore lint/suspicious/noControlCharactersInRegex: control characters are what is looked for
  if (bad || /[\u0000-\u001f\u007f\\]/.test(key) || Buffer.byteLength(key) > 1024) {
    throw new VarveError(
      'INVALID_KEY',
      `Not a storage ${what}: ${JSON.stringify(key)}. Use names joined by "/", without ".", "..", control characters or backslashes, at most 1024 bytes.`,
      { context: { key } },
    )
  }
}
