import { abortError } from '@varve/core'
import type { FtpConnection } from './connection.ts'
import { isReply, isTooMany } from './ftp-error.ts'

/** How long a connection that nobody uses is kept, in milliseconds. */
const IDLE_MS = 15_000

/** What a connection is for: a transfer takes as long as the other end of it likes, a command does not. */
export type ConnectionUse = 'transfer' | 'command'

interface Waiter {
  readonly use: ConnectionUse
  readonly grant: () => void
}

/**
 * The connections of a driver. Transfers never take the last one where there are several, so that a look-up need
 * not wait for uploads whose source stalls.
 */
export class ConnectionPool {
  readonly #open: (signal: AbortSignal | undefined) => Promise<FtpConnection>
  readonly #busy = new Map<FtpConnection, ConnectionUse>()
  readonly #idle = new Map<FtpConnection, NodeJS.Timeout>()
  readonly #waiting: Waiter[] = []
  /** Given out or being opened. */
  readonly #taken: Record<ConnectionUse, number> = { transfer: 0, command: 0 }
  #limit: number

  constructor(limit: number, open: (signal: AbortSignal | undefined) => Promise<FtpConnection>) {
    this.#limit = limit
    this.#open = open
  }

  /** A connection, which must be given back by {@link ConnectionPool.release}. */
  async acquire(use: ConnectionUse, signal?: AbortSignal): Promise<FtpConnection> {
    for (;;) {
      await this.#slot(use, signal)
      const connection = this.#idleOne()
      if (connection) {
        this.#busy.set(connection, use)
        return connection
      }
      try {
        const opened = await this.#open(signal)
        this.#busy.set(opened, use)
        return opened
      } catch (error) {
        this.#taken[use]--
        const others = this.#taken.transfer + this.#taken.command
        // the server allows no more than there are: wait for one of them
        if (isTooMany(error) && others > 0 && !signal?.aborted) this.#limit = Math.min(this.#limit, others)
        else throw error
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
    const connection = await this.acquire(use, signal)
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

  /** Ends all connections, also those in use. The pool can be used again. */
  close(): void {
    for (const [connection, timer] of this.#idle) {
      clearTimeout(timer)
      connection.close()
    }
    this.#idle.clear()
    for (const connection of this.#busy.keys()) connection.close()
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

  #mayTake(use: ConnectionUse): boolean {
    const { transfer, command } = this.#taken
    if (transfer + command >= this.#limit) return false
    return use === 'command' || transfer < Math.max(1, this.#limit - 1)
  }

  async #slot(use: ConnectionUse, signal: AbortSignal | undefined): Promise<void> {
    if (signal?.aborted) throw abortError(signal)
    const { promise, resolve, reject } = Promise.withResolvers<void>()
    const waiter: Waiter = { use, grant: resolve }
    const giveUp = () => {
      const index = this.#waiting.indexOf(waiter)
      if (index < 0) return // granted just before
      this.#waiting.splice(index, 1)
      if (signal) reject(abortError(signal))
    }
    this.#waiting.push(waiter)
    signal?.addEventListener('abort', giveUp, { once: true })
    this.#serve()
    try {
      await promise
    } finally {
      signal?.removeEventListener('abort', giveUp)
    }
  }

  /** Lets those go on who can, first come first served. */
  #serve(): void {
    for (let index = 0; index < this.#waiting.length; ) {
      const waiter = this.#waiting[index]
      if (waiter && this.#mayTake(waiter.use)) {
        this.#waiting.splice(index, 1)
        this.#taken[waiter.use]++
        waiter.grant()
      } else {
        index++
      }
    }
  }
}
