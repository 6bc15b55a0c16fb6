import { once } from 'node:events'
import { type AddressInfo, connect, createServer, type Server, type Socket } from 'node:net'
import { type Cut, DelayedFlow, type FlowRules, type Passage } from './delayed-flow.ts'

const LOOPBACK = '127.0.0.1'

/** Which way bytes go through a {@link NetworkProxy}. */
export type ProxyDirection = 'toServer' | 'toClient'

/**
 * A TCP proxy on a loopback port, in front of a server: adds delay, slows down, cuts, stalls and refuses connections.
 *
 * ```ts
 * await using proxy = await NetworkProxy.start({ port: server.port })
 * proxy.latencyMs = 50
 * const storage = new SftpDriver({ host: '127.0.0.1', port: proxy.port, … })
 * ```
 *
 * Half-closed connections stay half-closed, and a reset at one end becomes one at the other, after the bytes that
 * came before it. What it holds in memory is at most 8 MiB a connection and direction.
 */
export class NetworkProxy implements AsyncDisposable {
  /** Where it listens, on 127.0.0.1. */
  readonly port: number
  /**
   * Added round trip in milliseconds, half of it each way. Order and bandwidth are kept. The handshake of TCP
   * itself, which the proxy answers, has no delay. Default: 0.
   */
  latencyMs = 0
  /** How much a connection carries in each direction, in bytes a second. Default: no limit. */
  bytesPerSecond: number = Number.POSITIVE_INFINITY
  readonly #target: { host: string; port: number }
  readonly #server: Server
  readonly #connections = new Set<Connection>()
  readonly #passed: Record<ProxyDirection, number> = { toServer: 0, toClient: 0 }
  readonly #cutsToCome: Partial<Record<ProxyDirection, { bytes: number; how: Cut }>> = {}
  #cuts = 0
  #stalled = false
  #refusing = false

  private constructor(server: Server, target: { host: string; port: number }) {
    this.#server = server
    this.#target = target
    this.port = (server.address() as AddressInfo).port
    server.on('connection', client => this.#relay(client))
    server.on('listening', () => this.#refusing && server.close())
  }

  /** Listens on a free port, for a server on 127.0.0.1 or on `host`. The server need not be there yet. */
  static async start(target: { host?: string; port: number }): Promise<NetworkProxy> {
    const server = createServer({ allowHalfOpen: true, noDelay: true })
    server.listen(0, LOOPBACK)
    await once(server, 'listening')
    return new NetworkProxy(server, { host: LOOPBACK, ...target })
  }

  /** Bytes handed on to the server since the start, over all connections. */
  get bytesToServer(): number {
    return this.#passed.toServer
  }

  /** Bytes handed on to clients since the start, over all connections. */
  get bytesToClient(): number {
    return this.#passed.toClient
  }

  /** How many connections {@link NetworkProxy.cutAfter} and {@link NetworkProxy.endAfter} have cut so far. */
  get cuts(): number {
    return this.#cuts
  }

  /** How many connections there are. */
  get connections(): number {
    return this.#connections.size
  }

  /**
   * Resets a connection, once: the one that carries the last of the next `bytes` bytes in this direction, right after
   * it, with the rest of what it had to carry lost. Bytes are counted from now, over all connections. After 0 bytes the
   * first one that has something to carry is reset before it. A later call for the same direction takes its place.
   * The reset waits some 20 ms behind these bytes, so that the other end can read them, while no answer to them
   * comes through.
   */
  cutAfter(bytes: number, direction: ProxyDirection): void {
    this.#cutsToCome[direction] = { bytes, how: 'reset' }
  }

  /**
   * Ends one direction of a connection in order (FIN), once, where {@link NetworkProxy.cutAfter} would reset it: to the
   * receiver it looks as if the sender had no more to send. What the sender sends after it is taken and lost; the
   * other direction goes on.
   */
  endAfter(bytes: number, direction: ProxyDirection): void {
    this.#cutsToCome[direction] = { bytes, how: 'end' }
  }

  /** Resets all connections that there are; what they held is lost. */
  cutAll(): void {
    for (const connection of this.#connections) connection.cut()
  }

  /** Hands nothing on any more; connections are still accepted, and stay silent. */
  stall(): void {
    this.#stalled = true
  }

  /** Ends a stall: what was held goes on its way. */
  resume(): void {
    this.#stalled = false
    for (const connection of this.#connections) connection.pump()
  }

  /** Has new connections refused. Those that are there stay. */
  refuse(): void {
    this.#refusing = true
    if (this.#server.listening) this.#server.close()
  }

  /** Accepts connections again, on the same port. */
  accept(): void {
    if (this.#refusing) this.#server.listen(this.port, LOOPBACK)
    this.#refusing = false
  }

  /** Ends everything that stands in the way: refusals, a stall, cuts to come, latency and a limit of bandwidth. */
  heal(): void {
    this.accept()
    this.latencyMs = 0
    this.bytesPerSecond = Number.POSITIVE_INFINITY
    delete this.#cutsToCome.toServer
    delete this.#cutsToCome.toClient
    this.resume()
  }

  /** Stops listening and resets all connections. */
  async [Symbol.asyncDispose](): Promise<void> {
    this.refuse()
    const closed = [...this.#connections].map(connection => connection.closed)
    this.cutAll()
    await Promise.all(closed)
  }

  #relay(client: Socket): void {
    const server = connect({ ...this.#target, allowHalfOpen: true, noDelay: true })
    const connection = new Connection(client, server, direction => ({
      delayMs: () => this.latencyMs / 2,
      bytesPerSecond: () => this.bytesPerSecond,
      stalled: () => this.#stalled,
      pass: bytes => this.#pass(bytes, direction),
    }))
    this.#connections.add(connection)
    connection.closed.then(() => this.#connections.delete(connection))
  }

  #pass(bytes: number, direction: ProxyDirection): Passage {
    const next = this.#cutsToCome[direction]
    const cut = next !== undefined && bytes >= next.bytes ? next.how : undefined
    const passed = next !== undefined && cut ? next.bytes : bytes
    if (cut) {
      delete this.#cutsToCome[direction]
      this.#cuts++
    } else if (next !== undefined) {
      next.bytes -= bytes
    }
    this.#passed[direction] += passed
    return { bytes: passed, cut }
  }
}

/** A client's connection and the one to the server that belongs to it. */
class Connection {
  /** Resolves when both are gone. */
  readonly closed: Promise<unknown>
  readonly #sockets: readonly Socket[]
  readonly #flows: readonly DelayedFlow[]

  constructor(
    client: Socket,
    server: Socket,
    rulesOf: (direction: ProxyDirection) => Omit<FlowRules, 'cut'>,
  ) {
    const cut = () => this.cut()
    this.#sockets = [client, server]
    this.#flows = [
      new DelayedFlow(client, server, { ...rulesOf('toServer'), cut }),
      new DelayedFlow(server, client, { ...rulesOf('toClient'), cut }),
    ]
    this.closed = Promise.all(
      this.#sockets.map(socket => {
        socket.on('error', () => undefined) // what follows is its 'close', which the flows pass on
        return new Promise(resolve => socket.once('close', resolve))
      }),
    )
  }

  pump(): void {
    for (const flow of this.#flows) flow.pump()
  }

  cut(): void {
    for (const flow of this.#flows) flow.stop()
    for (const socket of this.#sockets) {
      // libuv resets no connection that it has half closed; and a reset by itself waits until all is written
      if (!socket.writableEnded) socket.resetAndDestroy()
      socket.destroy()
    }
  }
}
