import { setTimeout as sleep } from 'node:timers/promises'
import { AbortWatch } from './abort-watch.ts'
import { Connection, type ConnectionOptions, type ConnectionOwner } from './connection.ts'
import { abortedError, NbdError, toNbdError } from './errors.ts'
import { assertSameExport, type NbdExport } from './handshake.ts'
import type { Operation } from './operation.ts'
import { COMMAND, COMMAND_FLAG } from './protocol.ts'
import { isMutation, type Request } from './request.ts'

/** How long to wait before each try to open a lost connection again, until one has brought a reply: six seconds in all. */
const REOPEN_DELAYS_MS: readonly number[] = [0, 50, 100, 200, 400, 800, 1600, 3200]
/** A request that was on so many lost connections is taken for what ends them. */
const MAX_LOSSES = REOPEN_DELAYS_MS.length
/** How long a caller who gave up waits for the rest of a chunk that a socket receives into its memory, or sends from there. */
const GIVE_BACK_MS = 250

/** How a {@link Dispatcher} opens connections. */
export interface DispatcherOptions {
  readonly connection: Omit<ConnectionOptions, 'signal'>
  /** The most connections to open. */
  readonly maxConnections: number
}

/**
 * Spreads the requests of all operations over the connections, opens more of them as they fill up, opens a lost
 * one again and replays the reads that were on it.
 */
export class Dispatcher implements ConnectionOwner {
  readonly #options: DispatcherOptions
  readonly #export: NbdExport
  readonly #connections: Connection[] = []
  #maxConnections: number
  #opening: Promise<void> | undefined
  /** Gives up the opening of an additional connection. */
  #additional = new AbortController()
  /** Tries to open a lost connection since the last reply. */
  #tries = 0
  readonly #closing = new AbortController()

  readonly #queue: Operation[] = []
  readonly #replays: Request[] = []
  #isPumpDue = false
  readonly #watch: AbortWatch = new AbortWatch((operation, signal) =>
    this.#giveUp(operation, abortedError(signal)),
  )

  /** Why nothing works any more. */
  #failure: NbdError | undefined
  /** Why nothing can be written any more. */
  #writesLost: NbdError | undefined
  #acknowledgedWrites = 0
  #flushedWrites = 0

  constructor(first: Connection, options: DispatcherOptions) {
    this.#options = options
    this.#export = first.negotiated
    this.#maxConnections = options.maxConnections
    this.#adopt(first)
  }

  /** How many writes the server has acknowledged without promising that they are durable. */
  get acknowledgedWrites(): number {
    return this.#acknowledgedWrites
  }

  /** The first `count` of {@link Dispatcher.acknowledgedWrites} are durable. */
  markFlushed(count: number): void {
    this.#flushedWrites = Math.max(this.#flushedWrites, count)
  }

  /** Carries out an operation. */
  async submit(operation: Operation, signal?: AbortSignal): Promise<void> {
    if (signal?.aborted) throw abortedError(signal)
    if (this.#failure) throw this.#failure
    this.#queue.push(operation)
    this.#schedulePump()
    if (!signal) return operation.promise
    this.#watch.add(operation, signal)
    try {
      await operation.promise
    } finally {
      this.#watch.delete(operation, signal)
    }
  }

  /** Ends all connections; what is outstanding fails with `NBD_DISCONNECTED`. */
  async close(): Promise<void> {
    if (this.#closing.signal.aborted) return
    this.#closing.abort()
    const idle = this.#connections.filter(connection => connection.isIdle)
    const hangUps = idle.map(connection => connection.disconnect())
    this.fail(new NbdError('NBD_DISCONNECTED', 'The NBD client was closed.'), idle)
    await Promise.all([...hangUps, this.#opening])
  }

  replied(request: Request): void {
    const { command, flags, error } = request
    this.#tries = 0
    if (!error && isMutation(command) && (flags & COMMAND_FLAG.fua) === 0) this.#acknowledgedWrites++
    request.operation.finish(request, error)
  }

  drained(): void {
    this.#pump()
  }

  lost(connection: Connection, error: NbdError, outstanding: readonly Request[]): void {
    const index = this.#connections.indexOf(connection)
    if (index >= 0) this.#connections.splice(index, 1)
    if (this.#acknowledgedWrites > this.#flushedWrites) {
      this.#writesLost ??= new NbdError(
        'NBD_DISCONNECTED',
        'The connection to the NBD server was lost after writes that were not flushed; they may be lost as well. Write them again with a new client.',
        { cause: error },
      )
    }
    // A server may leave an additional connection waiting for as long as it likes: the first one matters more.
    if (this.#connections.length === 0) this.#additional.abort()
    for (const request of outstanding) this.#recover(request, error)
    if (error.code === 'NBD_PROTOCOL') this.fail(error)
    this.#schedulePump()
  }

  /** Puts a request that was on a lost connection back in line, or ends it. */
  #recover(request: Request, error: NbdError): void {
    if (error.code !== 'NBD_ABORTED') request.losses++
    const isHopeless =
      this.#failure !== undefined || error.code === 'NBD_PROTOCOL' || error.code === 'NBD_TIMEOUT'
    if (request.operation.isGivenUp || isHopeless) {
      request.operation.finish(request, error)
    } else if (request.isReplayable && request.losses < MAX_LOSSES) {
      request.restart()
      this.#replays.push(request)
    } else {
      request.operation.finish(request, unrecoverable(request, error))
    }
  }

  /** Calls of one turn of the event loop are sent together. */
  #schedulePump(): void {
    if (this.#isPumpDue) return
    this.#isPumpDue = true
    queueMicrotask(() => {
      this.#isPumpDue = false
      this.#pump()
    })
  }

  #pump(): void {
    for (;;) {
      const connection = this.#leastBusy()
      const request = connection && this.#nextRequest()
      if (!request) break
      connection.add(request)
    }
    for (const connection of this.#connections) connection.transmit()
    if (this.#hasWork() && !this.#opening && !this.#failure) this.#openMore()
  }

  #leastBusy(): Connection | undefined {
    let best: Connection | undefined
    for (const connection of this.#connections) {
      if (connection.hasRoom && (!best || connection.load < best.load)) best = connection
    }
    return best
  }

  #hasWork(): boolean {
    for (let head = this.#queue[0]; head; head = this.#queue[0]) {
      if (this.#writesLost && changesOrFlushes(head)) this.#giveUp(head, this.#writesLost)
      if (!head.isExhausted) break
      this.#queue.shift()
    }
    return this.#replays.length + this.#queue.length > 0
  }

  #nextRequest(): Request | undefined {
    for (let replay = this.#replays.shift(); replay; replay = this.#replays.shift()) {
      if (!replay.operation.isGivenUp) return replay
    }
    return this.#hasWork() ? this.#queue[0]?.nextRequest() : undefined
  }

  #openMore(): void {
    const isLost = this.#connections.length === 0
    if (!isLost && this.#connections.length >= this.#maxConnections) return
    this.#opening = (isLost ? this.#reopen() : this.#openAnother())
      .catch(error => this.fail(toNbdError(error, 'NBD_CONNECT', 'Could not open a connection')))
      .finally(() => {
        this.#opening = undefined
        this.#schedulePump()
      })
  }

  async #openAnother(): Promise<void> {
    this.#additional = new AbortController()
    const { signal } = this.#additional
    try {
      await this.#open(AbortSignal.any([signal, this.#closing.signal]))
    } catch (error) {
      if (isFinal(error)) throw error
      // The server takes no more of them: the ones that are open do the work.
      if (!signal.aborted) this.#maxConnections = Math.max(1, this.#connections.length)
    }
  }

  async #reopen(): Promise<void> {
    const deadline = AbortSignal.timeout(this.#options.connection.timeoutMs)
    const signal = AbortSignal.any([deadline, this.#closing.signal])
    let last: unknown
    while (this.#tries < REOPEN_DELAYS_MS.length && !signal.aborted) {
      if (!this.#hasWork()) return
      try {
        await sleep(REOPEN_DELAYS_MS[this.#tries++], undefined, { signal })
        await this.#open(signal)
        return
      } catch (error) {
        if (isFinal(error)) throw error
        last = error
      }
    }
    if (this.#closing.signal.aborted) return
    this.#tries = 0
    const why = last instanceof Error ? ` ${last.message}` : ''
    const text = `The connection to the NBD server is lost and could not be opened again.${why}`
    this.#rejectWaiting(new NbdError('NBD_DISCONNECTED', text, { cause: last }))
  }

  async #open(signal: AbortSignal): Promise<void> {
    const connection = await Connection.open({ ...this.#options.connection, signal })
    try {
      assertSameExport(this.#export, connection.negotiated)
    } catch (error) {
      await connection.disconnect()
      throw error
    }
    this.#adopt(connection)
  }

  #adopt(connection: Connection): void {
    if (connection.isLost) throw new NbdError('NBD_CONNECT', 'The NBD server hung up after the negotiation.')
    this.#connections.push(connection)
    connection.start(this)
  }

  #giveUp(operation: Operation, error: NbdError): void {
    if (operation.isGivenUp) return
    operation.giveUp(error)
    if (operation.isSettled) return
    // A socket holds the caller's memory: if the server stalls now, the connection must go.
    const loseStalled = () => {
      for (const connection of [...this.#connections])
        if (connection.isLentTo(operation)) connection.lose(error)
    }
    // Where this process itself stood still, what the server has done meanwhile is seen first.
    const timer = setTimeout(() => setImmediate(loseStalled), GIVE_BACK_MS)
    const clear = () => clearTimeout(timer)
    operation.promise.then(clear, clear)
  }

  /** Ends all connections for good: what is outstanding, and what comes later, fails with `error`. */
  fail(error: NbdError, except: readonly Connection[] = []): void {
    if (this.#failure) return
    this.#failure = error
    this.#closing.abort()
    for (const connection of [...this.#connections]) if (!except.includes(connection)) connection.lose(error)
    this.#rejectWaiting(error)
  }

  #rejectWaiting(error: NbdError): void {
    for (const request of this.#replays.splice(0)) this.#giveUp(request.operation, error)
    for (const operation of this.#queue.splice(0)) this.#giveUp(operation, error)
  }
}

/** Whether no later try could end otherwise. */
function isFinal(error: unknown): boolean {
  return error instanceof NbdError && (error.code === 'NBD_PROTOCOL' || error.context.changed === true)
}

function changesOrFlushes(operation: Operation): boolean {
  return isMutation(operation.command) || operation.command === COMMAND.flush
}

function unrecoverable(request: Request, error: NbdError): NbdError {
  const { offset, length, losses } = request
  const what = request.isReplayable
    ? `with the same read on it ${losses} times`
    : 'with a request that may have changed data'
  const text = `The connection to the NBD server was lost ${what}. ${error.message}`
  return new NbdError('NBD_DISCONNECTED', text, { cause: error, context: { offset, length } })
}
