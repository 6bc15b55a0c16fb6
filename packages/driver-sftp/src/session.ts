import { setTimeout as delay } from 'node:timers/promises'
import { abortError, unlessAborted, VarveError } from '@varve/core'
import { addressOf, connect } from './connect.ts'
import type { SftpConnection } from './connection.ts'
import { fingerprintOf, type HostKeyRule } from './host-key.ts'
import { isFolder, makeFolder } from './remote-folder.ts'
import { isLost, isStatus, STATUS, sftpError } from './sftp-error.ts'
import type { SftpSettings } from './sftp-options.ts'

/** How long a connection is kept that nobody uses. */
const KEPT_MS = 30_000
const FIRST_PAUSE_MS = 250
const LONGEST_PAUSE_MS = 10_000

/** The folder of the storage, on a connection that was just alive. */
export interface StorageRoot {
  readonly connection: SftpConnection
  /** The folder's path on the server: absolute, without symbolic links. */
  readonly path: string
}

/** A {@link StorageRoot} that is kept open until it is given back. */
export interface Lease extends Disposable {
  readonly root: StorageRoot
}

/**
 * The one connection of a driver: made when it is needed, made anew when it broke, ended when nobody has used it for
 * a while.
 */
export class SftpSession {
  readonly #settings: SftpSettings
  readonly #rule: HostKeyRule
  #root: Promise<StorageRoot> | undefined
  #leases = 0
  #unused: NodeJS.Timeout | undefined
  #firstFingerprint: string | undefined

  constructor(settings: SftpSettings) {
    this.#settings = settings
    this.#rule = settings.hostKeyRule ?? {
      load: async () => ({ judge: key => this.#judgeLikeFirst(key), types: [] }),
    }
  }

  /** The fingerprint of the host key that was seen first. */
  get fingerprint(): string | undefined {
    return this.#firstFingerprint
  }

  /** The storage on a live connection, until the lease is disposed of. One attempt. */
  async lease(signal?: AbortSignal): Promise<Lease> {
    if (signal?.aborted) throw abortError(signal)
    clearTimeout(this.#unused)
    this.#leases++
    let given = true
    const giveBack = () => {
      if (given && --this.#leases === 0) this.#unused = setTimeout(() => this.#end(), KEPT_MS)
      given = false
    }
    try {
      return { root: await unlessAborted(this.#live(), signal), [Symbol.dispose]: giveBack }
    } catch (error) {
      giveBack()
      throw error
    }
  }

  /** Does something on a live connection; does it again on a new one where that broke. */
  async use<T>(work: (root: StorageRoot) => Promise<T>, signal?: AbortSignal): Promise<T> {
    for (let failures = 0; ; ) {
      try {
        return await this.#useOnce(work, signal)
      } catch (error) {
        await this.pause(error, ++failures, signal)
      }
    }
  }

  /** Waits before the attempt that follows the nth failure in a row; throws the error where none should. */
  async pause(error: unknown, failures: number, signal?: AbortSignal): Promise<void> {
    if (signal?.aborted) throw abortError(signal)
    if (!isLost(error) || failures > this.#settings.retries) throw error
    const pause = Math.min(FIRST_PAUSE_MS * 2 ** (failures - 1), LONGEST_PAUSE_MS)
    try {
      await delay(pause, undefined, signal ? { signal } : {})
    } catch (cause) {
      throw signal?.aborted ? abortError(signal) : cause
    }
  }

  /** Ends the connection; the next call makes a new one. */
  async end(): Promise<void> {
    clearTimeout(this.#unused)
    const root = this.#root
    this.#root = undefined
    // one that could not be made needs no end, and whoever wanted it has the error
    const made = await root?.catch(() => undefined)
    await made?.connection.end()
  }

  async #useOnce<T>(work: (root: StorageRoot) => Promise<T>, signal?: AbortSignal): Promise<T> {
    using lease = await this.lease(signal)
    return await work(lease.root)
  }

  #end(): void {
    // a failure to say goodbye is no news: the socket is closed in any case
    this.end().catch(() => undefined)
  }

  async #live(): Promise<StorageRoot> {
    for (;;) {
      this.#root ??= this.#open()
      const opening = this.#root
      const root = await opening.catch(error => {
        if (this.#root === opening) this.#root = undefined
        throw error
      })
      if (root.connection.failure === undefined) return root
      if (this.#root === opening) this.#root = undefined
    }
  }

  async #open(): Promise<StorageRoot> {
    const connection = await connect(this.#settings, this.#rule)
    this.#firstFingerprint ??= connection.fingerprint
    try {
      return { connection, path: await this.#findRoot(connection) }
    } catch (error) {
      await connection.end()
      throw error
    }
  }

  async #findRoot(connection: SftpConnection): Promise<string> {
    const { pathPrefix, create } = this.#settings
    const location = `${addressOf(this.#settings)}/${pathPrefix}`
    try {
      const start = pathPrefix === '' ? '.' : pathPrefix
      if (create) await makeFolders(connection, start)
      const path = await connection.call<string>((sftp, done) => sftp.realpath(start, done))
      if (await isFolder(connection, path)) return path
    } catch (error) {
      if (!isStatus(error, STATUS.NO_SUCH_FILE)) throw sftpError(error, 'Opening', location)
    }
    throw new VarveError(
      'STORAGE_NOT_FOUND',
      `The storage folder ${location} is not there, or is no folder. Make it, or mount what belongs there.`,
      { context: { location } },
    )
  }

  /** Without a rule: whoever answered first. */
  #judgeLikeFirst(key: Buffer): 'accepted' | { refused: string } {
    const first = this.#firstFingerprint
    if (first === undefined || first === fingerprintOf(key)) return 'accepted'
    return { refused: `and it was ${first} a moment ago` }
  }
}

/** Makes a folder and its parents where they are missing. */
async function makeFolders(connection: SftpConnection, path: string): Promise<void> {
  const names = path.split('/')
  for (let depth = 1; depth <= names.length; depth++) {
    const folder = names.slice(0, depth).join('/')
    if (folder !== '' && folder !== '.') await makeFolder(connection, folder)
  }
}
