import { randomBytes } from 'node:crypto'
import { abortError, type PutOptions, TEMPORARY_PREFIX, type UploadBody, VarveError } from '@varve/core'
import type { Stats } from 'ssh2'
import type { SftpConnection } from './connection.ts'
import { freeSpace } from './free-space.ts'
import { close, openToRead, openToWrite, sync } from './remote-file.ts'
import { assertRoot, isPlain, look, makeKeyFolders, pathIn, removeEmptyFolders } from './remote-folder.ts'
import type { StorageRoot } from './session.ts'
import { isFull, isStatus, STATUS, sftpError, statusOf } from './sftp-error.ts'
import { writeWindow } from './write-window.ts'

/** How often a folder may vanish between its making and the first file in it, before that is an error. */
const ATTEMPTS = 100
/** How often a file is given a name that others give to theirs as well, before that is an error. */
const REPLACEMENTS = 20
/** A file system with less room than that is full for a write that failed. */
const LITTLE_ROOM = 1024 * 1024

/** A file under a temporary name in its final folder, over several connections if need be. Its owner publishes or discards it. */
export class PendingFile {
  /** How many bytes of the body need not be sent again. Always 0 where its size is unknown: it cannot be opened in the middle. */
  kept = 0
  readonly #folders: readonly string[]
  readonly #name: string
  readonly #temporary = temporaryName()
  /** What an object is called that is to be replaced where the server cannot do that in one step. */
  readonly #former = temporaryName()
  #created = false
  #whole: Stats | undefined
  #published = false
  #removalAsked = false
  /** Whether there may be a former object under that name. */
  #isAside = false

  constructor(key: string) {
    const names = key.split('/')
    this.#name = names.pop() ?? ''
    this.#folders = names
  }

  /** Whether there may be something of it on the server. */
  get isCreated(): boolean {
    return this.#created
  }

  /** Whether nothing of the body is needed any more. */
  get isWhole(): boolean {
    return this.#whole !== undefined
  }

  /** Writes what is missing of a body and makes it durable. */
  async write(root: StorageRoot, key: string, body: UploadBody, options: PutOptions): Promise<void> {
    const { connection } = root
    const { signal, onProgress } = options
    const isNew = !this.#created
    const handle = await this.#open(root, signal)
    let stats: Stats
    try {
      if (!isNew) await this.#checkKept(connection, handle)
      const size = await writeWindow(connection, handle, body, {
        key,
        start: this.kept,
        signal,
        onWritten: position => onProgress?.(position),
        onKept: position => {
          if (body.size !== undefined) this.kept = position
        },
      })
      await sync(connection, handle)
      stats = await connection.call<Stats>((sftp, done) => sftp.fstat(handle, done))
      if (stats.size !== size) {
        throw new VarveError(
          'STORAGE_FAILED',
          `${size} bytes were written, but the file has ${stats.size}. Check the server's disk, and whether the source changed.`,
          { context: { key, size, stored: stats.size } },
        )
      }
    } catch (error) {
      const failure = await this.#explained(root, error)
      // a handle that cannot be closed goes with its connection; the failure is what counts
      await close(connection, handle).catch(() => undefined)
      throw failure
    }
    await close(connection, handle)
    this.#whole = stats
  }

  /**
   * Gives the file its final name and makes that durable, where the server can. May be called again after a connection
   * that broke.
   */
  async publish(root: StorageRoot, signal?: AbortSignal): Promise<Stats> {
    if (this.#whole === undefined) throw new TypeError('A file is published when it is whole.')
    if (signal?.aborted) throw abortError(signal)
    const { connection } = root
    const temporary = this.#pathIn(root, this.#temporary)
    const again = this.#published
    if (!again || (await look(connection, temporary))) {
      this.#published = true
      try {
        await this.#rename(root)
      } catch (error) {
        // a request of the connection that broke may be carried out only now
        if (!again || (await look(connection, temporary))) throw error
      }
    }
    if (again && !(await this.#isStored(root))) {
      const path = this.#pathIn(root, this.#name)
      throw new VarveError(
        'STORAGE_FAILED',
        `${path} is not there, or another one, although it was given its name. Does somebody else change the storage?`,
        { context: { path, size: this.#whole.size }, retryable: true },
      )
    }
    if (this.#isAside) await remove(connection, this.#pathIn(root, this.#former))
    this.#isAside = false
    const depths = Array.from({ length: this.#folders.length + 1 }, (_, depth) => depth)
    await Promise.all(
      depths.map(depth => syncFolder(connection, pathIn(root, ...this.#folders.slice(0, depth)))),
    )
    return this.#whole
  }

  /** Where a former object is, as a key, that was to be replaced and has not got its name back. */
  get former(): string | undefined {
    return this.#isAside ? [...this.#folders, this.#former].join('/') : undefined
  }

  /** Whether the object may be stored although nothing says so. */
  get mayBeStored(): boolean {
    return this.#published
  }

  /**
   * Removes the file and the folders that are empty without it; an object that was to be replaced gets its name back.
   * A file that turns out to have its final name already stays, and is what this returns.
   */
  async discard(root: StorageRoot, signal?: AbortSignal): Promise<Stats | undefined> {
    const asked = this.#removalAsked
    this.#removalAsked = true
    const removed = await remove(root.connection, this.#pathIn(root, this.#temporary), signal)
    if (!removed && this.#published && (await this.#isStored(root))) {
      // a removal whose answer was lost may be why the file is gone, and the object that of somebody else
      if (!asked) return this.publish(root, signal)
      throw new VarveError('STORAGE_FAILED', 'The server does not say whether a file was renamed or removed.')
    }
    if (this.#isAside) await this.#bringBack(root, signal)
    await removeEmptyFolders(root, this.#folders, { signal })
    return undefined
  }

  /** Whether the object is there, by its size. */
  async #isStored(root: StorageRoot): Promise<boolean> {
    const stats = await look(root.connection, this.#pathIn(root, this.#name))
    return stats?.size === this.#whole?.size
  }

  #pathIn(root: StorageRoot, name: string): string {
    return pathIn(root, ...this.#folders, name)
  }

  /** Gives the file its name, also over another one. */
  async #rename(root: StorageRoot): Promise<void> {
    const { connection } = root
    const from = this.#pathIn(root, this.#temporary)
    const to = this.#pathIn(root, this.#name)
    try {
      await connection.call((sftp, done) => sftp.ext_openssh_rename(from, to, done), { flush: true })
      return
    } catch (error) {
      if (!isStatus(error, STATUS.OP_UNSUPPORTED)) throw error
    }
    for (let attempt = 1; ; attempt++) {
      try {
        await rename(connection, from, to)
        return
      } catch (error) {
        // the plain rename of version 3 does not replace: an object is gone for a moment while it is replaced
        if (!isStatus(error, STATUS.FAILURE) || attempt === REPLACEMENTS) throw error
        const [source, there] = await Promise.all([look(connection, from), look(connection, to)])
        if (!source || there?.isFile() === false) throw error
        if (there) await this.#setAside(root)
      }
    }
  }

  /** Keeps the object that has the name of this one until this one has it. */
  async #setAside(root: StorageRoot): Promise<void> {
    const { connection } = root
    const former = this.#pathIn(root, this.#former)
    if (this.#isAside) await remove(connection, former) // others have replaced it by now
    this.#isAside = true
    await rename(connection, this.#pathIn(root, this.#name), former).catch(unlessMissing)
  }

  async #bringBack(root: StorageRoot, signal: AbortSignal | undefined): Promise<void> {
    const { connection } = root
    const path = this.#pathIn(root, this.#name)
    const former = this.#pathIn(root, this.#former)
    try {
      await rename(connection, former, path).catch(unlessMissing)
    } catch (error) {
      if (!(await look(connection, path, { signal }))?.isFile()) throw error
      await remove(connection, former, signal) // others have stored the object meanwhile
    }
    this.#isAside = false
  }

  async #open(root: StorageRoot, signal: AbortSignal | undefined): Promise<Buffer> {
    const { connection } = root
    const folder = pathIn(root, ...this.#folders)
    for (let attempt = 1; ; attempt++) {
      try {
        const mayLack = this.#folders.length > 0
        if (mayLack && (attempt > 1 || !(await isPlain(connection, folder, { signal })))) {
          await makeKeyFolders(root, this.#folders, { signal })
        }
        this.#created = true
        return await openToWrite(connection, this.#pathIn(root, this.#temporary), signal)
      } catch (error) {
        // whoever deletes the last object of a folder removes the folder; make it again
        if (!isStatus(error, STATUS.NO_SUCH_FILE) || attempt === ATTEMPTS) throw error
        await assertRoot(root, { signal })
      }
    }
  }

  /**
   * Sets {@link PendingFile.kept} back to 0 where the server has lost something. What is behind it is written over and
   * never cut off: a request to do so may outlive its connection, and would take away what was written since.
   */
  async #checkKept(connection: SftpConnection, handle: Buffer): Promise<void> {
    const stats = await connection.call<Stats>((sftp, done) => sftp.fstat(handle, done))
    if (stats.size < this.kept) this.kept = 0
  }

  /** A refusal with no reason is most often a full disk: the file system tells. */
  async #explained(root: StorageRoot, error: unknown): Promise<unknown> {
    if (!isStatus(error, STATUS.FAILURE) || isFull(error)) return error
    const space = await freeSpace(root).catch(() => undefined) // the failure itself is what counts
    if (!space || (space.bytes >= LITTLE_ROOM && !space.noFiles)) return error
    const left = space.noFiles ? 'no more files can be made' : `${space.bytes} bytes are left`
    return new VarveError(
      'STORAGE_FULL',
      `The storage is full: ${left} in ${root.path} on the server. Delete or prune backups, or add space.`,
      { context: { path: root.path, freeBytes: space.bytes }, cause: sftpError(error, 'Writing', root.path) },
    )
  }
}

function temporaryName(): string {
  return TEMPORARY_PREFIX + randomBytes(8).toString('hex')
}

/** Renames a file; fails where something has the name. */
function rename(connection: SftpConnection, from: string, to: string): Promise<void> {
  return connection.call((sftp, done) => sftp.rename(from, to, done), { flush: true })
}

/** Removes a file; false where it was not there. */
async function remove(connection: SftpConnection, path: string, signal?: AbortSignal): Promise<boolean> {
  try {
    await connection.call((sftp, done) => sftp.unlink(path, done), { signal })
    return true
  } catch (error) {
    unlessMissing(error)
    return false
  }
}

function unlessMissing(error: unknown): void {
  if (!isStatus(error, STATUS.NO_SUCH_FILE)) throw error
}

/**
 * Makes the entries of a folder durable. SFTP has no such request; OpenSSH, however, opens a folder like a file and
 * then takes `fsync@openssh.com` for it. Other servers refuse one or the other: then it is left to their file system.
 */
async function syncFolder(connection: SftpConnection, path: string): Promise<void> {
  let handle: Buffer
  try {
    handle = await openToRead(connection, path)
  } catch (error) {
    if (statusOf(error) === undefined) throw error
    return
  }
  try {
    await sync(connection, handle)
  } catch (error) {
    if (statusOf(error) === undefined) throw error
  }
  await close(connection, handle)
}
