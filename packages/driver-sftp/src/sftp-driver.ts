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
  type ObjectStream,
  objectNotFound,
  type PutOptions,
  removeEach,
  type StorageDriver,
  type StorageHealth,
  type StoredObject,
  TEMPORARY_PREFIX,
  toUploadBody,
  type UploadBody,
} from '@varve/core'
import type { Stats } from 'ssh2'
import { addressOf } from './connect.ts'
import { freeSpace } from './free-space.ts'
import { type OpenObject, SftpStream } from './read-window.ts'
import { openToRead } from './remote-file.ts'
import { assertRoot, isPlain, look, pathIn, removeEmptyFolders } from './remote-folder.ts'
import { type Lease, SftpSession, type StorageRoot } from './session.ts'
import { isStatus, STATUS, sftpError } from './sftp-error.ts'
import { type SftpDriverOptions, type SftpSettings, sftpSettings } from './sftp-options.ts'
import { storeObject, toObject } from './store-object.ts'
import { type FoundFile, walkFiles } from './walk-files.ts'

/**
 * Keeps backups in a folder of an SFTP server.
 *
 * An object is written under a temporary name beside its place, by many positioned writes under way at once, made
 * durable, proven by its size and given its name in one step, with OpenSSH's extensions `fsync@openssh.com` and
 * `posix-rename@openssh.com`. Servers that lack them keep files as durable as they see fit, and an object is
 * gone for a moment while it is replaced. Folders are made as they are needed (mode 0700, files 0600) and removed
 * when they are empty.
 *
 * A connection that breaks is made anew: uploads of replayable bodies and downloads go on where they were.
 *
 * Symbolic links inside the folder are not followed and are no objects. SFTP has no request that would hold on to
 * that, though: who can change the folder on the server in the very moment of a call can lead it elsewhere.
 */
export class SftpDriver implements StorageDriver {
  readonly type = 'sftp'
  readonly location: string
  readonly capabilities: DriverCapabilities = {
    rangeRead: true,
    atomicPublish: true,
    resume: true,
    parallelParts: false,
  }
  /** Where nothing is given that the server could be known by. */
  readonly notice?: string
  readonly #settings: SftpSettings
  readonly #session: SftpSession

  /** @throws INVALID_CONFIG for an option that cannot be used */
  constructor(options: SftpDriverOptions) {
    this.#settings = sftpSettings(options)
    this.#session = new SftpSession(this.#settings)
    const { username, pathPrefix } = this.#settings
    const address = addressOf(this.#settings).replace('://', `://${encodeURIComponent(username)}@`)
    // after the host a second "/" begins an absolute path, and one alone the user's own
    this.location = pathPrefix === '' ? address : `${address}/${pathPrefix}`
    if (!this.#settings.hostKeyRule) {
      this.notice = `The host key of ${addressOf(this.#settings)} is compared with nothing, so another server could take its place. Set hostKey to its fingerprint, which a check of the storage tells, or knownHosts.`
    }
  }

  /**
   * The fingerprint of the server's host key, such as `SHA256:…`; undefined before the first connection. Show it
   * to whoever configured no `hostKey`, so that they can compare it with the server's.
   */
  get hostKeyFingerprint(): string | undefined {
    return this.#session.fingerprint
  }

  async put(key: string, body: UploadBody | Readable, options: PutOptions = {}): Promise<StoredObject> {
    const { signal } = options
    try {
      assertKey(key)
      if (signal?.aborted) throw abortError(signal)
      const upload = failsWithProgress(options, guarded =>
        storeObject(this.#session, key, toUploadBody(body), guarded),
      )
      return await endsAfterAbort(upload, signal)
    } finally {
      if (body instanceof Readable) body.destroy()
    }
  }

  async get(key: string, { range, signal }: GetOptions = {}): Promise<ObjectStream> {
    assertKey(key)
    if (range) assertRange(range)
    const object = await this.#openRetrying(key, signal, 0)
    const end = Math.min(range?.end ?? object.size, object.size)
    return new SftpStream(object, {
      key,
      range: { start: Math.min(range?.start ?? 0, end), end },
      signal,
      reopen: async (error, failures) => {
        await this.#session.pause(error, failures, signal)
        return this.#openRetrying(key, signal, failures)
      },
    })
  }

  async stat(key: string, { signal }: CallOptions = {}): Promise<StoredObject | undefined> {
    assertKey(key)
    return this.#use('Looking up', key, signal, async root => {
      const stats = await this.#lookAt(root, key, signal)
      return stats && toObject(key, stats)
    })
  }

  async *list(prefix: string, { signal }: CallOptions = {}): AsyncGenerator<StoredObject> {
    assertKey(prefix, 'prefix')
    const wanted = (key: string) => isKey(key) && (key.startsWith(prefix) || prefix.startsWith(`${key}/`))
    const folder = prefix.slice(0, Math.max(0, prefix.lastIndexOf('/')))
    const takes = (key: string) => wanted(key) && key.startsWith(prefix)
    for await (const { key, stats } of this.#files(folder, wanted, takes, signal)) yield toObject(key, stats)
  }

  async delete(key: string, { signal }: CallOptions = {}): Promise<void> {
    assertKey(key)
    await this.#use('Deleting', key, signal, async root => {
      const stats = await this.#lookAt(root, key, signal)
      if (stats) await this.#remove(root, key, signal)
    })
  }

  async check({ signal }: CallOptions = {}): Promise<StorageHealth> {
    const connect = async () => {
      using lease = await this.#session.lease(signal)
      const space = await freeSpace(lease.root, signal)
      return { ...(space && { freeBytes: space.bytes }), ...this.#hostKeyNotice() }
    }
    return checkStorage(this, { connect, ...(signal && { signal }) })
  }

  /** Removes the temporary files that killed processes left of their uploads. */
  async cleanUp({ olderThan, signal }: CleanUpOptions): Promise<number> {
    const isTemporary = (key: string) => key.slice(key.lastIndexOf('/') + 1).startsWith(TEMPORARY_PREFIX)
    return removeEach(this.#files('', isKey, isTemporary, signal), async ({ key, stats }) => {
      if (stats.mtime * 1000 >= olderThan.getTime()) return false
      await this.#use('Deleting', key, signal, root => this.#remove(root, key, signal))
      return true
    })
  }

  /** Closes the connections. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.#session.end()
  }

  #hostKeyNotice(): { notice?: string } {
    if (this.#settings.hostKeyRule) return {}
    return {
      notice: `The host key ${this.hostKeyFingerprint} was accepted without being compared with anything. Compare it with the server's (ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub) and set hostKey to it.`,
    }
  }

  /** Does something with the storage, again where the connection broke meanwhile. */
  async #use<T>(
    doing: string,
    key: string,
    signal: AbortSignal | undefined,
    work: (root: StorageRoot) => Promise<T>,
  ): Promise<T> {
    try {
      return await this.#session.use(work, signal)
    } catch (error) {
      throw sftpError(error, doing, key)
    }
  }

  /** The plain file of a key. Undefined where there is none; the storage itself is there. */
  async #lookAt(root: StorageRoot, key: string, signal: AbortSignal | undefined): Promise<Stats | undefined> {
    const path = pathIn(root, key)
    const [plain, stats] = await Promise.all([
      isPlain(root.connection, path, { signal }),
      look(root.connection, path, { signal }),
    ])
    if (plain && stats?.isFile()) return stats
    if (stats === undefined) await assertRoot(root, { signal })
    return undefined
  }

  /** Opens an object after some failures in a row. */
  async #openRetrying(key: string, signal: AbortSignal | undefined, failures: number): Promise<OpenObject> {
    for (let failed = failures; ; ) {
      try {
        return await this.#open(key, signal)
      } catch (error) {
        await this.#session.pause(error, ++failed, signal)
      }
    }
  }

  async #open(key: string, signal: AbortSignal | undefined): Promise<OpenObject> {
    const lease = await this.#session.lease(signal)
    try {
      const { connection } = lease.root
      // first of all, since a FIFO that somebody put there would hold up the server
      const found = await this.#lookAt(lease.root, key, signal)
      const handle = found && (await this.#openFound(lease, key, signal))
      if (handle) {
        const { size, mtime } = await connection.call<Stats>((sftp, done) => sftp.fstat(handle, done))
        return { lease, handle, size, mtime }
      }
    } catch (error) {
      lease[Symbol.dispose]()
      throw sftpError(error, 'Reading', key)
    }
    lease[Symbol.dispose]()
    throw objectNotFound(key, this.location)
  }

  async #openFound(lease: Lease, key: string, signal: AbortSignal | undefined): Promise<Buffer | undefined> {
    try {
      return await openToRead(lease.root.connection, pathIn(lease.root, key), signal)
    } catch (error) {
      if (isStatus(error, STATUS.NO_SUCH_FILE)) return undefined
      throw error
    }
  }

  async #remove(root: StorageRoot, key: string, signal: AbortSignal | undefined): Promise<void> {
    const path = pathIn(root, key)
    try {
      await root.connection.call((sftp, done) => sftp.unlink(path, done), { signal })
    } catch (error) {
      if (!isStatus(error, STATUS.NO_SUCH_FILE)) throw error
    }
    await removeEmptyFolders(root, key.split('/').slice(0, -1), { signal })
  }

  /** The files in a folder of keys. A connection that breaks meanwhile ends it: what was given cannot be taken back. */
  async *#files(
    folder: string,
    enters: (folder: string) => boolean,
    takes: (key: string) => boolean,
    signal: AbortSignal | undefined,
  ): AsyncGenerator<FoundFile> {
    const plain = await this.#use('Listing', folder, signal, async root => {
      await assertRoot(root, { signal })
      return folder === '' || (await isPlain(root.connection, pathIn(root, folder), { signal }))
    })
    if (!plain) return
    try {
      using lease = await this.#session.lease(signal)
      const { root } = lease
      const pathOf = (folder: string) => (folder === '' ? root.path : pathIn(root, folder))
      yield* walkFiles(root.connection, folder, { pathOf, enters, takes, signal })
    } catch (error) {
      throw sftpError(error, 'Listing', folder)
    }
  }
}
