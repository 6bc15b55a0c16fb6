import { constants, type Stats } from 'node:fs'
import { type FileHandle, lstat, open, unlink } from 'node:fs/promises'
import { Readable } from 'node:stream'
import {
  abortError,
  assertKey,
  assertRange,
  type CallOptions,
  type CleanUpOptions,
  checkStorage,
  type DriverCapabilities,
  endsAfterAbort,
  failsWithProgress,
  type GetOptions,
  isKey,
  objectNotFound,
  type PutOptions,
  removeEach,
  type StorageDriver,
  type StorageHealth,
  type StoredObject,
  TEMPORARY_PREFIX,
  toUploadBody,
  type UploadBody,
  unlessAborted,
  VarveError,
} from '@varve/core'
import { fileCall } from './file-call.ts'
import { FileStream } from './file-stream.ts'
import { FolderPath } from './folder.ts'
import { isErrno, isMissing, localError, unlessMissing } from './local-error.ts'
import { PendingFile } from './pending-file.ts'
import { type LocalDriverOptions, StorageRoot } from './storage-root.ts'
import { untilAborted } from './until-aborted.ts'
import { type FoundFile, walkFiles } from './walk-files.ts'
import { writeFile } from './write-file.ts'

/**
 * Keeps backups in a folder of this machine: a disk, or a mounted share (NFS, SMB). Linux only.
 *
 * An object is written under a temporary name beside its place, made durable (fsync), given its name in one
 * step, and the folders on the way are made durable too. Folders are made as they are needed (mode 0700,
 * files 0600, less the umask) and removed when they are empty.
 *
 * Symbolic links inside the folder are never followed and are no objects: who can write to the storage cannot
 * make the driver read or write outside of it.
 */
export class LocalDriver implements StorageDriver {
  readonly type = 'local'
  readonly location: string
  readonly capabilities: DriverCapabilities = {
    rangeRead: true,
    atomicPublish: true,
    resume: false,
    parallelParts: false,
  }
  readonly #root: StorageRoot

  /** @throws INVALID_CONFIG for a path that is not absolute, or a marker that is no file name */
  constructor(options: LocalDriverOptions) {
    this.#root = new StorageRoot(options)
    this.location = this.#root.path
  }

  async put(key: string, body: UploadBody | Readable, options: PutOptions = {}): Promise<StoredObject> {
    try {
      this.#assertKey(key)
      const upload = failsWithProgress(options, guarded => this.#store(key, toUploadBody(body), guarded))
      return await endsAfterAbort(upload, options.signal)
    } finally {
      if (body instanceof Readable) body.destroy()
    }
  }

  async get(key: string, options: GetOptions = {}): Promise<Readable> {
    const { range, signal } = options
    if (range) assertRange(range)
    const stream = await this.#at(key, 'Reading', signal, async (path, { last }) => {
      const file = await last.call(() => openPlainFile(path))
      try {
        const stats = await last.call(() => file.stat())
        if (stats.isFile() && !signal?.aborted) {
          const end = Math.min(range?.end ?? stats.size, stats.size)
          return new FileStream(file, this.#pathOf(key), { start: range?.start ?? 0, end }, signal)
        }
      } catch (error) {
        await fileCall(() => file.close())
        throw error
      }
      await fileCall(() => file.close())
      return undefined
    })
    if (stream) return stream
    throw objectNotFound(key, this.location)
  }

  async stat(key: string, options: CallOptions = {}): Promise<StoredObject | undefined> {
    return this.#at(key, 'Looking up', options.signal, async (path, { last }) => {
      const stats = await last.call(() => lstat(path))
      return stats.isFile() ? toObject(key, stats) : undefined
    })
  }

  async *list(prefix: string, options: CallOptions = {}): AsyncGenerator<StoredObject> {
    assertKey(prefix, 'prefix')
    const wanted = (path: string) => path.startsWith(prefix) && isKey(path) && path !== this.#root.marker
    const files = this.#files(prefix, wanted, wanted, options.signal)
    for await (const { path, stats } of untilAborted(files, options.signal)) yield toObject(path, stats)
  }

  async delete(key: string, options: CallOptions = {}): Promise<void> {
    await this.#at(key, 'Deleting', options.signal, async (path, folders) => {
      await folders.last.call(() => unlinkFile(path))
      await folders.last.sync()
      await folders.removeEmpty()
    })
  }

  async check(options: CallOptions = {}): Promise<StorageHealth> {
    const { signal } = options
    const connect = async () => ({ freeBytes: await unlessAborted(this.#root.freeBytes(signal), signal) })
    return checkStorage(this, { ...options, connect })
  }

  /**
   * Removes the temporary files that killed processes left of their uploads. A running upload whose file is
   * removed, for having been idle so long, fails.
   */
  async cleanUp({ olderThan, signal }: CleanUpOptions): Promise<number> {
    const isTemporary = (path: string) => split(path).name.startsWith(TEMPORARY_PREFIX)
    const files = this.#files('', isKey, isTemporary, signal)
    return removeEach(untilAborted(files, signal), async ({ path, stats }) => {
      if (stats.mtime >= olderThan) return false
      const removed = await this.#inFolderOf(path, 'Deleting', signal, async (file, folders) => {
        await folders.last.call(() => unlink(file))
        await folders.removeEmpty()
        return true
      })
      return removed === true
    })
  }

  /** Does nothing. */
  async [Symbol.asyncDispose](): Promise<void> {
    // nothing to end: no file stays open between calls
  }

  async #store(key: string, body: UploadBody, options: PutOptions): Promise<StoredObject> {
    const { signal } = options
    if (signal?.aborted) throw abortError(signal)
    const { folders, name } = split(key)
    let pending: PendingFile | undefined
    try {
      pending = await PendingFile.create(() => this.#root.open(signal), folders)
      const size = await writeFile(pending.file, body, { ...options, key })
      return toObject(key, await pending.publish(name, size, signal))
    } catch (error) {
      const failure = signal?.aborted ? abortError(signal) : localError(error, 'Writing', this.#pathOf(key))
      throw pending ? await discarded(pending, failure) : failure
    }
  }

  /** Does something at the place of a key. Undefined where the place, or what was looked for, is not there. */
  async #at<T>(
    key: string,
    doing: string,
    signal: AbortSignal | undefined,
    work: (path: string, folders: FolderPath) => Promise<T>,
  ): Promise<T | undefined> {
    this.#assertKey(key)
    if (signal?.aborted) throw abortError(signal)
    return unlessAborted(this.#inFolderOf(key, doing, signal, work), signal)
  }

  async #inFolderOf<T>(
    path: string,
    doing: string,
    signal: AbortSignal | undefined,
    work: (path: string, folders: FolderPath) => Promise<T>,
  ): Promise<T | undefined> {
    const { folders: names, name } = split(path)
    const root = await this.#root.open(signal)
    try {
      await using folders = await FolderPath.walk(root, names)
      return await work(folders.last.at(name), folders)
    } catch (error) {
      if (isMissing(error)) return undefined
      throw localError(error, doing, this.#pathOf(path))
    }
  }

  /** The files in the folder that a prefix leads to. */
  async *#files(
    prefix: string,
    enters: (path: string) => boolean,
    takes: (path: string) => boolean,
    signal: AbortSignal | undefined,
  ): AsyncGenerator<FoundFile> {
    const { folders: names } = split(prefix)
    const root = await this.#root.open(signal)
    try {
      // only the way there may be missing: an error of the walk must not pass for the end of the listing
      await using folders = await unlessMissing(FolderPath.walk(root, names))
      if (!folders) return
      yield* walkFiles(folders.last, { base: prefix.slice(0, prefix.lastIndexOf('/') + 1), enters, takes })
    } catch (error) {
      throw localError(error, 'Listing', this.#pathOf(prefix))
    }
  }

  #assertKey(key: string): void {
    assertKey(key)
    if (key !== this.#root.marker) return
    throw new VarveError('INVALID_KEY', `Not a storage key: ${key} is the marker of ${this.location}.`, {
      context: { key },
    })
  }

  #pathOf(key: string): string {
    return `${this.location.replace(/\/$/, '')}/${key}`
  }
}

function split(key: string): { folders: string[]; name: string } {
  const names = key.split('/')
  return { folders: names.slice(0, -1), name: names.at(-1) ?? '' }
}

function toObject(key: string, { size, mtime }: Stats): StoredObject {
  return { key, size, modifiedAt: mtime }
}

/** Opens what may be a plain file, without being held up by a FIFO that somebody put there. */
async function openPlainFile(path: string): Promise<FileHandle> {
  return open(path, constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK)
}

async function unlinkFile(path: string): Promise<void> {
  try {
    await unlink(path)
  } catch (error) {
    // a folder is no object
    if (!isMissing(error) && !isErrno(error, 'EISDIR')) throw error
  }
}

/** Discards what there is of an upload and returns the error to throw, which tells if something stays. */
async function discarded(pending: PendingFile, failure: VarveError): Promise<VarveError> {
  try {
    await pending.discard()
    return failure
  } catch (error) {
    const { code, message, context, cause, retryable } = failure
    const left = localError(error, 'Removing', 'what was written so far')
    return new VarveError(code, `${message} ${left.message}`, { context, cause, retryable })
  }
}
