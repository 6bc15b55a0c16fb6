import { abortError, VarveError } from '@varve/core'
import type { FtpConnection } from './connection.ts'
import { isReply, isTooMany } from './ftp-error.ts'

/** How long a connection that nobody uses is kept, in milliseconds. */
const IDLE_MS = 15_000

/** How long a server that turned a connection away is asked for no more than it had allowed, in milliseconds. */
const CAUTIOUS_MS = 60_000

/**
 * What a connection is for: an upload and a download take as long as the other end of them likes, a command does not, nor
 * does what is short.
 */
export type ConnectionUse = 'upload' | 'download' | 'command'

/** What waits for a connection. */
export interface ConnectionOptions {
  readonly signal?: AbortSignal | undefined
  /** Is told when it begins to wait for those that others have, and when that is over. */
  readonly onWait?: ((waits: boolean) => void) | undefined
}

interface Waiter {
  readonly use: ConnectionUse
  readonly grant: () => void
}

/**
 * The connections of a driver. Uploads and downloads never take the last one where there are several, so that a look-up
 * need not wait for uploads whose source stalls; nor do uploads take the last one of three that are left. A download that
 * waits goes before an upload that does, since whoever restores waits for it, but only one: a guest may be on an overlay
 * until that upload is done, and a restore or a verification always has another download that waits.
 */
export class ConnectionPool {
  readonly #open: (signal: AbortSignal | undefined) => Promise<FtpConnection>
  readonly #busy = new Map<FtpConnection, ConnectionUse>()
  readonly #idle = new Map<FtpConnection, NodeJS.Timeout>()
  /** In the order in which they came. */
  readonly #waiting: Waiter[] = []
  /** Whether a download went before an upload since one was last let go on. */
  #overtaken = false
  /** Given out or being opened. */
  readonly #taken: Record<ConnectionUse, number> = { upload: 0, download: 0, command: 0 }
  readonly #most: number
  #limit: number
  #cautious: NodeJS.Timeout | undefined
  #closing = new AbortController()

  constructor(limit: number, open: (signal: AbortSignal | undefined) => Promise<FtpConnection>) {
    this.#most = limit
    this.#limit = limit
    this.#open = open
  }

  /** Fires when the pool is closed: what was begun before is not to be tried again. */
  get closing(): AbortSignal {
    return this.#closing.signal
  }

  /**
   * A connection, which must be given back by {@link ConnectionPool.release}.
   *
   * @throws ABORTED also when the pool is closed meanwhile
   */
  async acquire(use: ConnectionUse, options: ConnectionOptions = {}): Promise<FtpConnection> {
    const { signal: caller, onWait } = options
    const signal = caller ? AbortSignal.any([caller, this.closing]) : this.closing
    for (;;) {
      await this.#slot(use, signal, onWait)
      const connection = this.#idleOne()
      if (connection) {
        this.#busy.set(connection, use)
        return connection
      }
      try {
        const opened = await this.#open(signal)
        if (signal.aborted) {
          opened.close()
          throw abortError(signal)
        }
        this.#busy.set(opened, use)
        return opened
      } catch (error) {
        this.#taken[use]--
        const others = this.#inUse
        // the server allows no more than there are: wait for one of them
        if (!isTooMany(error) || others === 0 || signal.aborted) throw error
        this.#limit = Math.min(this.#limit, others)
        clearTimeout(this.#cautious)
        this.#cautious = setTimeout(() => this.#trustAgain(), CAUTIOUS_MS)
        this.#cautious.unref()
      } finally {
        this.#serve()
      }
    }
  }

  /** Gives a connection back. */
  release(connection: FtpConnection): void {
    const use = this.#busy.get(connection)
    if (use === undefined) return
    this.#busy.delete(connection)
    this.#taken[use]--
    if (connection.usable) {
      const timer = setTimeout(() => {
        this.#idle.delete(connection)
        connection.close()
      }, IDLE_MS)
      // neither keeps the process alive
      timer.unref()
      connection.client.ftp.socket.unref()
      this.#idle.set(connection, timer)
    }
    this.#serve()
  }

  /** Does something on a connection of its own, which ends with the signal. */
  async use<T>(
    use: ConnectionUse,
    signal: AbortSignal | undefined,
    work: (connection: FtpConnection) => Promise<T>,
  ): Promise<T> {
    const connection = await this.acquire(use, { signal })
    const close = () => connection.close()
    signal?.addEventListener('abort', close, { once: true })
    try {
      if (signal?.aborted) throw abortError(signal)
      return await work(connection)
    } catch (error) {
      if (isReply(error, 421)) connection.close() // the server is about to do so
      throw error
    } finally {
      signal?.removeEventListener('abort', close)
      this.release(connection)
    }
  }

  /** Ends all connections, also those in use, and whoever waits for one. The pool can be used again. */
  close(): void {
    this.#closing.abort(new VarveError('ABORTED', 'The storage was closed while it was used.'))
    this.#closing = new AbortController()
    this.#trustAgain()
    for (const [connection, timer] of this.#idle) {
      clearTimeout(timer)
      connection.close()
    }
    this.#idle.clear()
    for (const connection of [...this.#busy.keys()]) {
      connection.close()
      this.release(connection) // who uses it may never end: a download that is not read
    }
  }

  /** Others may have had the connections that the server refused. */
  #trustAgain(): void {
    clearTimeout(this.#cautious)
    this.#limit = this.#most
    this.#serve()
  }

  #idleOne(): FtpConnection | undefined {
    for (const [connection, timer] of [...this.#idle].reverse()) {
      clearTimeout(timer)
      this.#idle.delete(connection)
      if (!connection.usable) continue
      connection.client.ftp.socket.ref()
      return connection
    }
    return undefined
  }

  get #inUse(): number {
    const { upload, download, command } = this.#taken
    return upload + download + command
  }

  #mayTake(use: ConnectionUse): boolean {
    if (this.#inUse >= this.#limit) return false
    if (use === 'command') return true
    const { upload, download } = this.#taken
    const transfers = Math.max(1, this.#limit - 1)
    if (upload + download >= transfers) return false
    return use === 'download' || transfers < 3 || upload < transfers - 1
  }

  async #slot(use: ConnectionUse, signal: AbortSignal, onWait?: (waits: boolean) => void): Promise<void> {
    if (signal.aborted) throw abortError(signal)
    const { promise, resolve, reject } = Promise.withResolvers<void>()
    const waiter: Waiter = { use, grant: resolve }
    const giveUp = () => {
      const index = this.#waiting.indexOf(waiter)
      if (index < 0) return // granted just before
      this.#waiting.splice(index, 1)
      reject(abortError(signal))
    }
    this.#waiting.push(waiter)
    signal.addEventListener('abort', giveUp, { once: true })
    this.#serve()
    const waits = this.#waiting.includes(waiter)
    if (waits) onWait?.(true)
    try {
      await promise
    } finally {
      signal.removeEventListener('abort', giveUp)
      if (waits) onWait?.(false)
    }
  }

  /** Lets those go on who can. */
  #serve(): void {
    for (let waiter = this.#next(); waiter; waiter = this.#next()) {
      this.#waiting.splice(this.#waiting.indexOf(waiter), 1)
      this.#taken[waiter.use]++
      waiter.grant()
    }
  }

  #next(): Waiter | undefined {
    const first = this.#waiting.find(({ use }) => this.#mayTake(use))
    if (first?.use !== 'upload') return first
    const download = this.#overtaken ? undefined : this.#waiting.find(({ use }) => use === 'download')
    this.#overtaken = download !== undefined
    return download ?? first
  }
}
