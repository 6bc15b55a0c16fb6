import { randomBytes } from 'node:crypto'
import { Readable } from 'node:stream'
import { setTimeout as sleep } from 'node:timers/promises'
import {
  abortError,
  assertKey,
  assertRange,
  type CallOptions,
  type CleanUpOptions,
  checkStorage,
  type DriverCapabilities,
  errorMessage,
  failsWithProgress,
  type GetOptions,
  isKey,
  isVarveError,
  objectNotFound,
  type PutOptions,
  readUpload,
  removeEach,
  type StorageDriver,
  type StorageHealth,
  type StoredObject,
  TEMPORARY_PREFIX,
  toUploadBody,
  type UploadBody,
  VarveError,
} from '@varve/core'
import type { RemoteFile } from './lsjson.ts'
import { type MoveOptions, RcloneHelper } from './rclone-helper.ts'
import { checkedPathPrefix, type RcloneDriverOptions } from './rclone-options.ts'

/** How often a call is made that fails by what may go away. */
const ATTEMPTS = 3
const FIRST_PAUSE_MS = 500
/** How long a folder of the storage that was seen counts as there, so that not every upload has to look. */
const SEEN_MS = 30_000
/** For the removal of what there is of an upload that failed or was given up. */
const REMOVAL_TIMEOUT_MS = 15_000

/**
 * Keeps backups on whatever `rclone` reaches. Each call runs the program: data is piped through it, never over a local
 * disk. An object is uploaded under a temporary name beside its place (`rclone rcat`), looked at, and moved to its
 * name on the server (`rclone moveto`).
 *
 * It keeps no process and no connection between calls. Folders that have become empty stay.
 */
export class RcloneDriver implements StorageDriver {
  readonly type = 'rclone'
  readonly location: string
  readonly capabilities: DriverCapabilities = {
    rangeRead: true,
    atomicPublish: true,
    resume: false,
    parallelParts: false,
  }
  readonly #rclone: RcloneHelper
  readonly #path: string
  readonly #create: boolean
  /** When the folder of the storage was last seen, by `performance.now()`. */
  #seenAt = Number.NEGATIVE_INFINITY
  /** Folders that have been made or found. */
  readonly #folders = new Set<string>()

  /** @throws INVALID_CONFIG, which names the option */
  constructor(options: RcloneDriverOptions) {
    const { pathPrefix = '', create = false, ...rest } = options
    this.#rclone = new RcloneHelper(rest)
    this.#path = checkedPathPrefix(pathPrefix)
    this.#create = create
    this.location = `rclone ${this.#rclone.target(this.#path)}`
  }

  async put(key: string, body: UploadBody | Readable, options: PutOptions = {}): Promise<StoredObject> {
    try {
      assertKey(key)
      const upload = toUploadBody(body)
      if (options.signal?.aborted) throw abortError(options.signal)
      if (upload.size === undefined) await this.#mustStream(key, options)
      const attempts = upload.replayable ? ATTEMPTS : 1
      return await failsWithProgress(options, options =>
        retrying(() => this.#store(key, upload, options), options, attempts),
      )
    } finally {
      if (body instanceof Readable) body.destroy()
    }
  }

  async get(key: string, options: GetOptions = {}): Promise<Readable> {
    const { range } = options
    if (range) assertRange(range)
    const object = await this.stat(key, options)
    if (!object) {
      throw objectNotFound(key, this.location)
    }
    const start = Math.min(range?.start ?? 0, object.size)
    const end = Math.max(start, Math.min(range?.end ?? object.size, object.size))
    const cat = { ...callOptions(options), toEnd: end === object.size }
    return this.#rclone.cat(this.#pathOf(key), { start, end }, cat)
  }

  async stat(key: string, options: CallOptions = {}): Promise<StoredObject | undefined> {
    assertKey(key)
    const file = await retrying(() => this.#rclone.stat(this.#pathOf(key), options), options)
    if (!file) await this.#mustBeThere(options)
    return file && toObject(key, file)
  }

  async *list(prefix: string, options: CallOptions = {}): AsyncGenerator<StoredObject> {
    assertKey(prefix, 'prefix')
    for await (const { key, file } of this.#files(prefix, options)) {
      if (key.startsWith(prefix) && isKey(key)) yield toObject(key, file)
    }
  }

  async delete(key: string, options: CallOptions = {}): Promise<void> {
    assertKey(key)
    const found = await retrying(() => this.#rclone.deleteFile(this.#pathOf(key), options), options)
    if (!found) await this.#mustBeThere(options)
  }

  async check(options: CallOptions = {}): Promise<StorageHealth> {
    const connect = async () => {
      await this.#rclone.version(options)
      await this.#mustBeThere(options)
      const freeBytes = await this.#rclone.freeBytes(this.#path, options)
      return freeBytes === undefined ? {} : { freeBytes }
    }
    return checkStorage(this, { ...options, connect })
  }

  /** Removes what killed processes left of their uploads: temporary objects and, on S3, parts of them. */
  async cleanUp({ olderThan, ...options }: CleanUpOptions): Promise<number> {
    return removeEach(this.#unfinished(olderThan, options), remove => remove())
  }

  /** What there is to remove of unfinished uploads that were last written before a time. */
  async *#unfinished(olderThan: Date, options: CallOptions): AsyncGenerator<() => Promise<boolean>> {
    for await (const { key, file } of this.#files('', options)) {
      if (!isTemporary(key) || !file.modifiedAt || file.modifiedAt >= olderThan) continue
      yield () => this.#rclone.deleteFile(this.#pathOf(key), options)
    }
    for (const { path, begunAt } of await this.#rclone.unfinishedUploads(this.#path, options)) {
      if (!isTemporary(path) || begunAt >= olderThan) continue
      yield async () => {
        await this.#rclone.removeParts(this.#pathOf(path), options)
        return true
      }
    }
  }

  /** Ends what the driver has running. */
  async [Symbol.asyncDispose](): Promise<void> {
    // nothing to end: no process outlives its call
  }

  async #store(key: string, body: UploadBody, options: PutOptions): Promise<StoredObject> {
    const { onProgress } = options
    const call = callOptions(options)
    const temporary = siblingOf(this.#pathOf(key), TEMPORARY_PREFIX + randomBytes(8).toString('hex'))
    await this.#rclone.mustBeNewEnough(call)
    // an upload makes every folder that is missing, also that of a disk which is not mounted any more
    if (performance.now() - this.#seenAt > SEEN_MS) await this.#mustBeThere(call)
    await this.#makeFolderOf(temporary, call)
    let size = 0
    let former: RemoteFile | undefined
    let moved: StoredObject | undefined // if a move that was begun has been made
    const onRemoving = (file: RemoteFile) => {
      former ??= file
    }
    try {
      await this.#rclone.rcat(temporary, signal => readUpload(body, { key, signal }), {
        ...call,
        ...(body.size !== undefined && { size: body.size }),
        onTaken: chunk => {
          size += chunk.byteLength
          body.recycle?.(chunk)
          onProgress?.(size)
        },
      })
      const file = await this.#rclone.stat(temporary, call)
      if (file?.size !== size) throw this.#damaged(key, size, file?.size)
      moved = toObject(key, file)
      await this.#publish(temporary, key, size, { ...call, onRemoving })
      return moved
    } catch (error) {
      this.#seenAt = Number.NEGATIVE_INFINITY // a server that was started anew may lack a disk
      const fate = moved ? await this.#fateOf(temporary, moved, call) : 'not stored'
      if (moved && fate === 'stored') return moved
      // of the former object and the new one, one has to stay
      if (former && !(await this.#isUnchanged(key, former, call))) throw this.#kept(temporary, key, error)
      const note = `Whether ${key} is stored all the same is not known: look for it, or write it again.`
      throw await this.#discarded(temporary, fate === 'unknown' ? withNote(error, note) : error, call)
    }
  }

  /** rclone makes it by itself, but fails where two uploads at once do so: a body that opens once would be lost. */
  async #makeFolderOf(path: string, call: CallOptions): Promise<void> {
    const folder = path.slice(0, Math.max(0, path.lastIndexOf('/')))
    if (folder === '' || folder === this.#path || this.#folders.has(folder)) return
    const { hasFolders } = await this.#rclone.features(call)
    if (hasFolders) await this.#rclone.makeFolder(folder, call)
    this.#folders.add(folder)
  }

  /** Carries the move through as far as it can: one that broke off may have removed the former object already. */
  async #publish(temporary: string, key: string, size: number, options: MoveOptions): Promise<void> {
    const call = callOptions(options)
    const move = async () => {
      try {
        await this.#rclone.moveTo(temporary, this.#pathOf(key), size, options)
      } catch (error) {
        // a move whose answer was lost has been made all the same
        if (call.signal?.aborted || (await this.#rclone.stat(temporary, call))) throw error
        if ((await this.#rclone.stat(this.#pathOf(key), call))?.size !== size) throw error
      }
    }
    await retrying(move, call)
  }

  /** What came of a move that was given up or has failed. One that copies may have done so, and not removed the other yet. */
  async #fateOf(
    temporary: string,
    { key, size }: StoredObject,
    call: CallOptions,
  ): Promise<'stored' | 'not stored' | 'unknown'> {
    const looking = cleanUpOptions(call)
    try {
      const left = await this.#rclone.stat(temporary, looking)
      const isThere = (await this.#rclone.stat(this.#pathOf(key), looking))?.size === size
      if (!left && isThere) return 'stored'
      return left && !isThere ? 'not stored' : 'unknown'
    } catch {
      return 'unknown' // the storage does not answer
    }
  }

  /** False also where the storage does not answer. */
  async #isUnchanged(key: string, former: RemoteFile, call: CallOptions): Promise<boolean> {
    const file = await this.#rclone.stat(this.#pathOf(key), cleanUpOptions(call)).catch(() => undefined)
    return file?.size === former.size && file.modifiedAt?.getTime() === former.modifiedAt?.getTime()
  }

  /** The error of a move that may have removed the former object, and that has left the new one where it was. */
  #kept(temporary: string, key: string, failure: unknown): VarveError {
    const from = this.#rclone.target(temporary)
    const to = this.#rclone.target(this.#pathOf(key))
    const code = isVarveError(failure) ? failure.code : 'UPLOAD_FAILED'
    const context = { ...(isVarveError(failure) && failure.context), kept: from }
    return new VarveError(
      code,
      `${errorMessage(failure)} The former ${key} may be gone. The new one was uploaded whole and is kept as ${from}: move it to ${to} with \`rclone moveto\` before a clean-up removes it, or upload it again.`,
      { context, cause: failure },
    )
  }

  /** Removes what there is of an upload and returns the error to throw, which tells if something stays. */
  async #discarded(temporary: string, failure: unknown, call: CallOptions): Promise<unknown> {
    try {
      const removing = cleanUpOptions(call)
      await this.#rclone.deleteFile(temporary, removing)
      await this.#rclone.removeParts(temporary, removing) // an rclone that was killed had no time for it
      return failure
    } catch {
      const left = `What was uploaded so far could not be removed; it is ${this.#rclone.target(temporary)}.`
      return withNote(failure, left)
    }
  }

  /** The files that a prefix may mean, also temporary ones, by their keys. */
  async *#files(prefix: string, options: CallOptions): AsyncGenerator<{ key: string; file: RemoteFile }> {
    const folder = prefix.slice(0, prefix.lastIndexOf('/') + 1)
    let found = false
    let missing = false
    const onMissing = () => {
      missing = true
    }
    const path = this.#pathOf(folder.slice(0, -1))
    for await (const file of this.#rclone.list(path, { ...callOptions(options), onMissing })) {
      // of a folder that is a file, rclone gives the file, as it would a file of that name inside it
      if (
        !found &&
        `/${folder}`.endsWith(`/${file.path}/`) &&
        (await this.stat(folder.slice(0, -1), options))
      )
        return
      found = true
      yield { key: folder + file.path, file }
    }
    if (missing) await this.#mustBeThere(options)
  }

  /** Nothing found is an answer only where something could be. */
  async #mustBeThere(options: CallOptions): Promise<void> {
    const call = callOptions(options)
    if (!(await retrying(() => this.#rclone.hasFolder(this.#path, call), call))) {
      this.#seenAt = Number.NEGATIVE_INFINITY
      this.#folders.clear()
      if (!this.#create) throw this.#missing()
      await this.#rclone.makeFolder(this.#path, call)
    }
    this.#seenAt = performance.now()
  }

  #missing(): VarveError {
    return new VarveError(
      'STORAGE_NOT_FOUND',
      `${this.location} is not there. Make the bucket or the folder (\`rclone mkdir\`), correct pathPrefix, or set create.`,
      { context: { location: this.location } },
    )
  }

  async #mustStream(key: string, options: CallOptions): Promise<void> {
    const { streamingUpload } = await this.#rclone.features(callOptions(options))
    if (streamingUpload) return
    throw new VarveError(
      'UPLOAD_FAILED',
      `rclone rcat: failed to upload ${key}: its size is not known, and ${this.location} takes no upload without it: rclone would spool it to a local disk. Give the size with the body.`,
      { context: { key, location: this.location } },
    )
  }

  #damaged(key: string, sent: number, stored: number | undefined): VarveError {
    const found = stored === undefined ? 'there is no object' : `the object has ${stored}`
    return new VarveError(
      'UPLOAD_FAILED',
      `rclone rcat: failed to upload ${key}: ${sent} bytes were sent, but ${found}. Check the storage.`,
      { context: { key, sent, stored }, retryable: true },
    )
  }

  #pathOf(key: string): string {
    if (key === '' || this.#path === '' || this.#path.endsWith('/')) return this.#path + key
    return `${this.#path}/${key}`
  }
}

/** An error that says something more. */
function withNote(error: unknown, note: string): unknown {
  if (!isVarveError(error)) return error
  const { code, message, context, cause, retryable } = error
  return new VarveError(code, `${message} ${note}`, { context, cause, retryable })
}

function isTemporary(key: string): boolean {
  return key.slice(key.lastIndexOf('/') + 1).startsWith(TEMPORARY_PREFIX)
}

function siblingOf(path: string, name: string): string {
  return path.slice(0, path.lastIndexOf('/') + 1) + name
}

/** With whole seconds: S3 tells of one object in those, and in a listing in parts of them. */
function toObject(key: string, { size, modifiedAt }: RemoteFile): StoredObject {
  const seconds = modifiedAt && Math.floor(modifiedAt.getTime() / 1000)
  return { key, size, ...(seconds !== undefined && { modifiedAt: new Date(seconds * 1000) }) }
}

/** What all calls have in common: a helper's have other options than a driver's. */
function callOptions({ signal, onCommand }: CallOptions): CallOptions {
  return { ...(signal && { signal }), ...(onCommand && { onCommand }) }
}

/** For what is left to do of a call that failed or was given up. */
function cleanUpOptions(options: CallOptions): CallOptions {
  return { ...callOptions(options), signal: AbortSignal.timeout(REMOVAL_TIMEOUT_MS) }
}

/** Makes a call again, after a pause, that failed by what may go away. One that timed out has taken long enough. */
async function retrying<T>(call: () => Promise<T>, { signal }: CallOptions, attempts = ATTEMPTS): Promise<T> {
  for (let attempt = 1; ; attempt++) {
    try {
      return await call()
    } catch (error) {
      const again = isVarveError(error) && error.retryable && error.code !== 'TIMEOUT'
      if (!again || attempt >= attempts || signal?.aborted) throw error
    }
    await sleep(FIRST_PAUSE_MS * 2 ** (attempt - 1), undefined, signal ? { signal } : {}).catch(
      () => undefined,
    )
    if (signal?.aborted) throw abortError(signal)
  }
}
