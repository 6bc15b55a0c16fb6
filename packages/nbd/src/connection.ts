import { connect, type Socket } from 'node:net'
import { describeAddress, type NbdAddress, socketTarget } from './address.ts'
import { ByteQueue } from './byte-queue.ts'
import { abortedError, NbdError, toNbdError } from './errors.ts'
import { type NbdExport, type NegotiationRequest, negotiate } from './handshake.ts'
import type { Operation } from './operation.ts'
import { COMMAND, REQUEST_HEADER } from './protocol.ts'
import { ReplyParser } from './reply-parser.ts'
import { encodeHeader, type Request } from './request.ts'
import { StallTimer } from './stall-timer.ts'

/** How to open a {@link Connection}. */
export interface ConnectionOptions {
  readonly address: NbdAddress
  readonly negotiation: NegotiationRequest
  /** For all of the opening, and then for the oldest outstanding request to make progress. */
  readonly timeoutMs: number
  /** For a flush, and for a write that is to be durable, when it is the oldest outstanding request. */
  readonly flushTimeoutMs: number
  /** Gives up the opening. */
  readonly signal?: AbortSignal | undefined
}

/** Who hears of what becomes of the requests. */
export interface ConnectionOwner {
  /** A request has its reply: done, or with {@link Request.error}. */
  replied(request: Request): void
  /** Some replies have been handled, and there may be room for more requests. */
  drained(): void
  /** The connection is gone; `outstanding` are the requests without a whole reply, in the order they were sent. */
  lost(connection: Connection, error: NbdError, outstanding: readonly Request[]): void
}

/** The most requests that are outstanding on one connection. */
const MAX_OUTSTANDING = 64
/** No more requests are sent while this many bytes of data are outstanding on one connection. */
const MAX_OUTSTANDING_BYTES = 4 * 1024 * 1024
/** What is received at once where many small replies are expected. */
const SCRATCH = 256 * 1024
/** What is received at once before the data of a large reply, which then goes right into the caller's memory. */
const SMALL_SCRATCH = 16 * 1024
/** Replies of this many bytes on average are large. */
const LARGE_REPLY = 128 * 1024
/** How long a server may take to hang up after it was told to. */
const HANG_UP_MS = 1000

/** One connection in its transmission phase: sends requests, matches replies, and notices when it is lost. */
export class Connection {
  readonly #socket: Socket
  readonly #options: ConnectionOptions
  readonly #scratch: Buffer = Buffer.allocUnsafeSlow(SCRATCH)
  readonly #smallScratch: Buffer = this.#scratch.subarray(0, SMALL_SCRATCH)
  readonly #handshake: ByteQueue = new ByteQueue()
  #parser: ReplyParser | undefined
  #owner: ConnectionOwner | undefined
  #negotiated: NbdExport | undefined
  #isLost = false
  /** The server said that it goes. */
  #farewell: NbdError | undefined

  readonly #outstanding = new Map<number, Request>()
  #outstandingBytes = 0
  #unsent: number[] = []
  #cookie = 0
  /** The operation whose memory the socket receives into. */
  #lent: Operation | undefined
  /** The writes whose data the socket has yet to send, and how many pieces of it. */
  readonly #sending = new Map<Operation, number>()

  /** The oldest outstanding request: it alone is timed, since the others may be waiting for it. */
  #oldest: Request | undefined
  readonly #stall: StallTimer

  private constructor(options: ConnectionOptions) {
    this.#options = options
    this.#stall = new StallTimer(Math.min(options.timeoutMs, options.flushTimeoutMs), () => {
      const timeoutMs = this.#limitOf(this.#oldest)
      const text = `The NBD server has not answered for ${timeoutMs} ms.`
      this.lose(new NbdError('NBD_TIMEOUT', text, { context: { timeoutMs } }))
    })
    this.#socket = connect({
      ...socketTarget(options.address),
      onread: { buffer: () => this.#nextBuffer(), callback: count => this.#receive(count) },
    })
    const address = describeAddress(options.address)
    const disconnected = (what: string, cause?: Error) => {
      const text = `The connection to the NBD server at ${address} ${what}`
      this.lose(new NbdError('NBD_DISCONNECTED', text, { cause, context: { address } }))
    }
    this.#socket.on('error', cause => disconnected(`broke: ${cause.message}`, cause))
    this.#socket.on('end', () => disconnected('was closed by the server.'))
    this.#socket.on('close', () => disconnected('was closed.'))
  }

  /** Connects and negotiates. `NBD_CONNECT`, `NBD_PROTOCOL`, `NBD_TIMEOUT` or `NBD_ABORTED` when that fails. */
  static async open(options: ConnectionOptions): Promise<Connection> {
    const { signal, timeoutMs, address } = options
    if (signal?.aborted) throw abortedError(signal)
    const connection = new Connection(options)
    const where = describeAddress(address)
    const timer = setTimeout(() => {
      const text = `The NBD server at ${where} did not finish the negotiation within ${timeoutMs} ms.`
      connection.lose(new NbdError('NBD_TIMEOUT', text, { context: { address: where } }))
    }, timeoutMs)
    const onAbort = () => signal && connection.lose(abortedError(signal))
    signal?.addEventListener('abort', onAbort, { once: true })
    try {
      await connection.#negotiate()
      return connection
    } catch (error) {
      const failure = toNbdError(error, 'NBD_CONNECT', 'The negotiation with the NBD server failed')
      connection.lose(failure)
      if (failure.code !== 'NBD_DISCONNECTED') throw failure
      throw new NbdError('NBD_CONNECT', `Could not connect. ${failure.message}`, {
        cause: failure.cause ?? failure,
        context: failure.context,
      })
    } finally {
      clearTimeout(timer)
      signal?.removeEventListener('abort', onAbort)
    }
  }

  /** What the server agreed to. */
  get negotiated(): NbdExport {
    if (!this.#negotiated) throw new Error('the negotiation is not done')
    return this.#negotiated
  }

  /** Whether it is gone. */
  get isLost(): boolean {
    return this.#isLost
  }

  /** Whether no reply is awaited. */
  get isIdle(): boolean {
    return this.#outstanding.size === 0
  }

  /** How busy it is, to compare connections: bytes of data that are outstanding, and something for each request. */
  get load(): number {
    return this.#outstandingBytes + this.#outstanding.size * REQUEST_HEADER
  }

  /** Whether it takes another request now. */
  get hasRoom(): boolean {
    return this.#outstanding.size < MAX_OUTSTANDING && this.#outstandingBytes < MAX_OUTSTANDING_BYTES
  }

  /** Begins the transmission phase. */
  start(owner: ConnectionOwner): void {
    this.#owner = owner
  }

  /** Takes a request, for the next {@link Connection.transmit}. */
  add(request: Request): void {
    this.#cookie = (this.#cookie + 1) >>> 0
    if (this.#outstanding.size === 0) this.#watch(request)
    this.#outstanding.set(this.#cookie, request)
    this.#outstandingBytes += request.payloadBytes
    this.#unsent.push(this.#cookie)
  }

  /** Sends what was added, in one write where there is no data in between. */
  transmit(): void {
    const unsent = this.#unsent
    if (unsent.length === 0 || this.#isLost) return
    this.#unsent = []
    const headers = Buffer.allocUnsafe(REQUEST_HEADER * unsent.length)
    this.#socket.cork()
    let start = 0
    let end = 0
    for (const cookie of unsent) {
      const request = this.#outstanding.get(cookie)
      if (!request) continue
      encodeHeader(headers, end, cookie, request)
      end += REQUEST_HEADER
      if (!request.data) continue
      this.#socket.write(headers.subarray(start, end))
      this.#send(request.operation, request.data)
      start = end
    }
    if (end > start) this.#socket.write(headers.subarray(start, end))
    this.#socket.uncork()
  }

  /** Whether the socket holds memory of `operation`: receives right into it, or has it still to send. */
  isLentTo(operation: Operation): boolean {
    return this.#lent === operation || this.#sending.has(operation)
  }

  /** Ends the connection because of `error`. */
  lose(error: NbdError): void {
    if (this.#isLost) return
    this.#isLost = true
    this.#stall.stop()
    this.#socket.destroy()
    this.#handshake.fail(error)
    this.#takeBack()
    // A socket that was destroyed sends nothing more.
    for (const operation of this.#sending.keys()) while (this.#sending.has(operation)) this.#sent(operation)
    const outstanding = [...this.#outstanding.values()]
    this.#outstanding.clear()
    this.#owner?.lost(this, error, outstanding)
  }

  /** Tells the server that the client goes, and waits until it has hung up, for a moment at most. */
  async disconnect(): Promise<void> {
    if (this.#isLost) return
    const farewell = Buffer.alloc(REQUEST_HEADER)
    encodeHeader(farewell, 0, 0, { command: COMMAND.disconnect, flags: 0, offset: 0, length: 0 })
    const { promise, resolve } = Promise.withResolvers<void>()
    this.#socket.once('close', () => resolve())
    const timer = setTimeout(() => this.#socket.destroy(), HANG_UP_MS)
    this.#socket.end(farewell)
    await promise
    clearTimeout(timer)
  }

  async #negotiate(): Promise<void> {
    const { negotiation } = this.#options
    const negotiated = await negotiate(this.#handshake, bytes => this.#socket.write(bytes), negotiation)
    this.#negotiated = negotiated
    this.#parser = new ReplyParser(negotiated, {
      find: cookie => {
        const request = this.#outstanding.get(cookie)
        if (request === this.#oldest) this.#stall.progress()
        return request
      },
      done: (cookie, request) => this.#done(cookie, request),
    })
    // Bytes that came with the last reply of the negotiation answer nothing: let the parser refuse them.
    if (this.#handshake.length > 0) {
      const early = await this.#handshake.take(this.#handshake.length)
      this.#parser.push(early, early.length)
    }
  }

  /** The data is not copied: the socket holds the caller's memory until the kernel, or nobody, has it. */
  #send(operation: Operation, data: Uint8Array): void {
    operation.lend()
    this.#sending.set(operation, (this.#sending.get(operation) ?? 0) + 1)
    this.#socket.write(data, () => this.#sent(operation))
  }

  #sent(operation: Operation): void {
    const pieces = this.#sending.get(operation)
    if (pieces === undefined) return // the connection was lost, and has given it back
    if (pieces > 1) this.#sending.set(operation, pieces - 1)
    else this.#sending.delete(operation)
    operation.giveBack()
  }

  #nextBuffer(): Uint8Array {
    // A connection that was lost while it received is asked once more, and must not take memory that it never gives back.
    const direct = this.#isLost ? undefined : this.#parser?.directTarget()
    if (direct) {
      this.#lent = direct.operation
      direct.operation.lend()
      return direct.memory
    }
    const isLarge = this.#outstandingBytes > LARGE_REPLY * this.#outstanding.size
    return isLarge ? this.#smallScratch : this.#scratch
  }

  #receive(count: number): boolean {
    try {
      const parser = this.#parser
      if (!parser) this.#handshake.push(this.#scratch.subarray(0, count))
      else if (this.#takeBack()) parser.received(count)
      else parser.push(this.#scratch, count)
      if (parser?.current === this.#oldest) this.#stall.progress()
    } catch (error) {
      this.lose(toNbdError(error, 'NBD_PROTOCOL', 'A reply of the NBD server could not be handled'))
    }
    if (this.#farewell) this.lose(this.#farewell)
    this.#owner?.drained()
    return true
  }

  #takeBack(): boolean {
    const lent = this.#lent
    this.#lent = undefined
    lent?.giveBack()
    return lent !== undefined
  }

  #done(cookie: number, request: Request): void {
    if (request.error?.errno === 'ESHUTDOWN') {
      // No reply but a good-bye: the request stays among those that are lost with the connection.
      this.#farewell ??= new NbdError('NBD_DISCONNECTED', 'The NBD server is shutting down.', {
        cause: request.error,
      })
      return
    }
    this.#outstanding.delete(cookie)
    this.#outstandingBytes -= request.payloadBytes
    if (request === this.#oldest) this.#watch(this.#outstanding.values().next().value)
    this.#owner?.replied(request)
  }

  #watch(oldest: Request | undefined): void {
    this.#oldest = oldest
    if (oldest) this.#stall.wait(this.#limitOf(oldest))
    else this.#stall.rest()
  }

  #limitOf(request: Request | undefined): number {
    const { timeoutMs, flushTimeoutMs } = this.#options
    return request?.isFlush ? flushTimeoutMs : timeoutMs
  }
}
