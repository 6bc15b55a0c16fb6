import { Readable } from 'node:stream'
import { type ErrorCode, VarveError } from './errors.ts'
import type { CommandEvent } from './events.ts'

/** A half-open range of bytes: `start` is the first byte, `end` the first one after it. */
export interface ByteRange {
  /** Offset of the first byte. */
  readonly start: number
  /** Offset of the first byte that is no more of it. */
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
  /** The size of the largest object in bytes whose body has no known size, where that is less. */
  readonly maxStreamSize?: number
}

/** Options of the calls that move no data, and what all calls have in common. */
export interface CallOptions {
  /** Ends the call with `ABORTED`. */
  signal?: AbortSignal
  /**
   * Is told of each external program that the call has run, when that has ended, and of what it printed; without
   * secrets. A driver that runs none calls it never. What it throws, or rejects with, is ignored.
   */
  onCommand?: (event: CommandEvent) => void
}

/** Options of {@link StorageDriver.put}. */
export interface PutOptions extends CallOptions {
  /** Gives the upload up; nothing of it is left behind. */
  signal?: AbortSignal
  /** Called with the bytes that have reached the storage so far; may go back after a retry. What it throws fails the upload. */
  onProgress?: (bytes: number) => void
}

/** Options of {@link StorageDriver.get}. */
export interface GetOptions extends CallOptions {
  /** Only these bytes; cut off at the object's end. Default: all. */
  range?: ByteRange
  /** Ends the download: the stream fails with `ABORTED`. */
  signal?: AbortSignal
  /**
   * Is told when the call begins to wait until other calls of the driver are done, as for a connection that they have, or
   * to collect bytes before it gives any, and when that is over. Whoever gives up what a storage is silent about leaves that
   * time out: meanwhile the driver itself gives up a server that is silent. One whose calls do neither never calls it.
   */
  onWait?: (waits: boolean) => void
}

/** The bytes of an object, as {@link StorageDriver.get} opens them. */
export interface ObjectStream extends Readable {
  /**
   * Optional: a consumer that is done with a chunk gives it back, so that its memory is used again. A chunk
   * given back must not be touched any more.
   */
  recycle?(chunk: Uint8Array): void
  /**
   * Optional: reads the next bytes right into the caller's memory, which saves a copy, and resolves with their
   * number: at least one, and 0 at the end only. One call at a time, and in place of reading the stream. After a
   * call that fails, or that is given up, the memory may still be written to: its owner does not use it again.
   */
  readInto?(memory: Uint8Array): Promise<number>
}

/** One thing that a storage was tried for. */
export interface StorageCheck {
  /** What was tried. */
  readonly name: 'connect' | 'write' | 'read' | 'list' | 'delete'
  /** Whether it worked. */
  readonly ok: boolean
  /** What went wrong and what to do, where it did not. */
  readonly message?: string
  /** The code of the error, where it did not work. */
  readonly code?: ErrorCode
}

/** The outcome of {@link StorageDriver.check}. */
export interface StorageHealth {
  /** Whether every check passed. */
  readonly ok: boolean
  /** The checks in the order they were made; the ones after a failure are left out. */
  readonly checks: readonly StorageCheck[]
  /** Bytes that can still be written, where the storage tells. */
  readonly freeBytes?: number
  /** What whoever set the storage up should know although it works, such as a server whose key nobody has confirmed. */
  readonly notice?: string
  /** How long the checks took, in milliseconds. */
  readonly durationMs: number
}

/**
 * The beginning of the names under which uploads are written before they are whole. Such a name is no key,
 * so it can be told from an object, also by a person who looks at the storage.
 */
export const TEMPORARY_PREFIX = '.varve-part-'

/** Options of {@link StorageDriver.cleanUp}. */
export interface CleanUpOptions extends CallOptions {
  /**
   * Only what was last written before this time is removed. An upload that runs is written to all the time;
   * leave a margin of hours for a slow source and for clocks that differ.
   */
  olderThan: Date
}

/**
 * A place where backups are kept. What every driver promises:
 *
 * - Keys are `/`-separated names relative to the driver's prefix; {@link assertKey} has the rules. What breaks
 *   them is refused with `INVALID_KEY`, and nothing outside the prefix is ever read or written.
 * - `put` resolves only when the object is whole and durable. Until then nothing is seen under the key, or
 *   the former object is, also by a download that has begun; after a failure or an abort nothing is left
 *   behind. A `Readable` given to `put` is destroyed, whatever comes of the upload.
 * - A source that fails, ends early or runs over its size is a failed upload, never a short object:
 *   {@link readUpload} sees to that.
 * - An object that ends early while it is read fails the stream of `get`; it is never a short end.
 * - A process that is killed may leave what it had uploaded under a temporary name, which no other method
 *   shows; `cleanUp` removes it.
 * - Errors are {@link VarveError}s without secrets.
 *
 * `@varve/testkit` has the suite that every driver passes against a real server.
 */
export interface StorageDriver extends AsyncDisposable {
  /** The kind of storage, such as `local` or `s3`. */
  readonly type: string
  /**
   * Where it is, for people: a path or an address with no secret in it. Records of what was done go by it and `type`: the two
   * are to tell a storage from every other that is in use, and stay as they are.
   */
  readonly location: string
  /** What it can do beyond the least. */
  readonly capabilities: DriverCapabilities
  /**
   * Optional: what of its settings works and is not safe, and what to do, such as a server that nothing is to be known by.
   * Each backup and each restore tells it once, by a `warning` event.
   */
  readonly notice?: string
  /**
   * Stores an object, replacing one of the same key. A `VarveError` of the source is thrown as it is, any
   * other as the cause of `UPLOAD_FAILED`.
   */
  put(key: string, body: UploadBody | Readable, options?: PutOptions): Promise<StoredObject>
  /** Opens an object, or a range of it. `OBJECT_NOT_FOUND` where there is none. The caller ends or destroys the stream. */
  get(key: string, options?: GetOptions): Promise<ObjectStream>
  /** The object's size and time, or undefined where there is none. */
  stat(key: string, options?: CallOptions): Promise<StoredObject | undefined>
  /**
   * All objects whose key begins with `prefix`, in no particular order; temporary ones of uploads are left out.
   * The prefix is a string and no folder: `a/b` finds `a/b`, `a/bc` and `a/b/c`. Nothing found is no error.
   */
  list(prefix: string, options?: CallOptions): AsyncIterable<StoredObject>
  /** Removes an object. One that is not there is no error. */
  delete(key: string, options?: CallOptions): Promise<void>
  /**
   * Writes, reads back, lists and deletes a probe: `checkStorage` does it for any driver. Never throws
   * for a storage that is not well: it says so.
   */
  check(options?: CallOptions): Promise<StorageHealth>
  /**
   * Removes what killed processes left of unfinished uploads and returns how many; `removeEach` goes on where the storage
   * denies one. Absent where nothing can be left.
   */
  cleanUp?(options: CleanUpOptions): Promise<number>
}

/** The error of {@link StorageDriver.get} for an object that is not there. */
export function objectNotFound(key: string, location: string): VarveError {
  return new VarveError(
    'OBJECT_NOT_FOUND',
    `There is no object ${key} in ${location}. Put it back from a copy of the storage, or use another backup.`,
    { context: { key, location } },
  )
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
      // An exhausted stream would read as an empty object.
      if (opened || range || body.readableEnded)
        throw new VarveError('INVALID_ARGUMENT', 'A stream can be uploaded only once and as a whole.')
      opened = true
      return body
    },
  }
}

/**
 * Refuses a key that is no plain relative path. A key is 1 to 1024 bytes of UTF-8: names of 1 to 255 bytes
 * joined by `/`. No name is `.` or `..`, holds a control character or a backslash, or begins with
 * {@link TEMPORARY_PREFIX}. The prefix of a listing may also be empty or end with `/`.
 *
 * @throws INVALID_KEY
 */
export function assertKey(key: string, what: 'key' | 'prefix' = 'key'): void {
  const fault = keyFault(what === 'prefix' ? key.replace(/\/$/, '') : key)
  if (fault === undefined || (what === 'prefix' && key === '')) return
  throw new VarveError('INVALID_KEY', `Not a storage ${what}: ${JSON.stringify(key)} ${fault}.`, {
    context: { key },
  })
}

/** Whether `text` is a key that {@link assertKey} accepts: for names that come from a storage. */
export function isKey(text: string): boolean {
  return keyFault(text) === undefined
}

function keyFault(key: string): string | undefined {
  if (key === '') return 'is empty'
  if (!key.isWellFormed()) return 'is not Unicode'
  // biome-ignore lint/suspicious/noControlCharactersInRegex: control characters are what is looked for
  if (/[\u0000-\u001f\u007f\\]/.test(key)) return 'holds a control character or a backslash'
  if (Buffer.byteLength(key) > 1024) return 'is longer than 1024 bytes'
  for (const name of key.split('/')) {
    if (name === '') return 'begins or ends with "/" or has "//" in it'
    if (name === '.' || name === '..') return 'has "." or ".." in it'
    if (Buffer.byteLength(name) > 255) return 'has a name of more than 255 bytes in it'
    if (name.startsWith(TEMPORARY_PREFIX)) return `has a name in it that is kept for unfinished uploads`
  }
  return undefined
}

/**
 * Refuses a range that is not one.
 *
 * @throws INVALID_ARGUMENT
 */
export function assertRange({ start, end }: ByteRange): void {
  if (Number.isSafeInteger(start) && Number.isSafeInteger(end) && start >= 0 && end >= start) return
  throw new VarveError('INVALID_ARGUMENT', `Not a range of bytes: ${start} to ${end}.`, {
    context: { start, end },
  })
}
