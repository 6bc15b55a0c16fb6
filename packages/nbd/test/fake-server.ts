import { mkdtemp, rm } from 'node:fs/promises'
import { connect, createServer, type Server, type Socket } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

// A server on a Unix socket that says what a test wants it to say, written from the protocol and not from the
// client: it shares no code with it.

export const HAS_FLAGS = 1
export const READ_ONLY = 2
export const SEND_FLUSH = 4
export const SEND_FUA = 8
export const SEND_TRIM = 32
export const SEND_WRITE_ZEROES = 64
export const MULTI_CONN = 256

/** What the server exports. */
export interface FakeExport {
  size: number
  /** Transmission flags. Default: none. */
  flags?: number
  /** Minimum, preferred, maximum. */
  blockSize?: readonly [number, number, number]
  /** Default: true. */
  structured?: boolean
  /** Ids of the contexts that it agrees to. */
  contexts?: Readonly<Record<string, number>>
}

export interface FakeRequest {
  command: 'read' | 'write' | 'disconnect' | 'flush' | 'trim' | 'writeZeroes' | 'blockStatus'
  flags: number
  cookie: Buffer
  offset: number
  length: number
  data: Buffer
}

export interface FakeServerOptions {
  export: FakeExport
  /** Answers a request. */
  onRequest?: (request: FakeRequest, connection: FakeConnection) => void
  /** Passes on what is sent, whole or in parts; `isData` for what a client cannot tell from other valid bytes. */
  send?: (bytes: Buffer, isData: boolean, socket: Socket) => void
}

const COMMANDS: Readonly<Record<number, FakeRequest['command']>> = {
  0: 'read',
  1: 'write',
  2: 'disconnect',
  3: 'flush',
  4: 'trim',
  6: 'writeZeroes',
  7: 'blockStatus',
}

export class FakeServer implements AsyncDisposable {
  readonly socketPath: string
  readonly connections: FakeConnection[] = []
  readonly #folder: string
  readonly #server: Server

  private constructor(folder: string, options: FakeServerOptions) {
    this.#folder = folder
    this.socketPath = join(folder, 's')
    this.#server = createServer(socket => this.connections.push(new FakeConnection(socket, options)))
  }

  static async start(options: FakeServerOptions): Promise<FakeServer> {
    const server = new FakeServer(await mkdtemp(join(tmpdir(), 'varve-nbd-')), options)
    await new Promise<void>(resolve => server.#server.listen(server.socketPath, resolve))
    return server
  }

  /** All requests so far, over all connections. */
  get requests(): FakeRequest[] {
    return this.connections.flatMap(connection => connection.requests)
  }

  /** A client of it that knows nothing of the protocol. */
  connect(): Socket {
    return connect(this.socketPath)
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const connection of this.connections) connection.socket.destroy()
    await new Promise(resolve => this.#server.close(resolve))
    await rm(this.#folder, { recursive: true, force: true })
  }
}

/** One client of the server. */
export class FakeConnection {
  readonly socket: Socket
  readonly requests: FakeRequest[] = []
  readonly #options: FakeServerOptions
  #received: Buffer = Buffer.alloc(0)
  #stage: 'flags' | 'options' | 'requests' = 'flags'

  constructor(socket: Socket, options: FakeServerOptions) {
    this.socket = socket
    this.#options = options
    socket.on('error', () => socket.destroy())
    socket.on('data', bytes => {
      this.#received = Buffer.concat([this.#received, bytes])
      while (this.#step());
    })
    this.send(Buffer.concat([Buffer.from('NBDMAGICIHAVEOPT'), u16(3)]))
  }

  send(bytes: Buffer, isData = false): void {
    if (this.socket.destroyed) return
    if (this.#options.send) this.#options.send(bytes, isData, this.socket)
    else this.socket.write(bytes)
  }

  simple(request: FakeRequest, error = 0, data: Buffer = Buffer.alloc(0)): void {
    this.send(Buffer.concat([u32(0x67446698), u32(error), request.cookie]))
    if (data.length > 0) this.send(data, true)
  }

  /** A chunk; `frame` is the part of the payload that a client can check. */
  chunk(
    request: FakeRequest,
    type: number,
    isLast: boolean,
    frame: Buffer,
    data: Buffer = Buffer.alloc(0),
  ): void {
    const length = u32(frame.length + data.length)
    this.send(Buffer.concat([u32(0x668e33ef), u16(isLast ? 1 : 0), u16(type), request.cookie, length, frame]))
    if (data.length > 0) this.send(data, true)
  }

  none(request: FakeRequest): void {
    this.chunk(request, 0, true, Buffer.alloc(0))
  }

  data(request: FakeRequest, offset: number, data: Buffer, isLast = false): void {
    this.chunk(request, 1, isLast, u64(offset), data)
  }

  hole(request: FakeRequest, offset: number, length: number, isLast = false): void {
    this.chunk(request, 2, isLast, Buffer.concat([u64(offset), u32(length)]))
  }

  error(request: FakeRequest, number: number, text = '', isLast = true): void {
    const message = Buffer.from(text)
    this.chunk(request, 0x8001, isLast, Buffer.concat([u32(number), u16(message.length), message]))
  }

  /** `extents` are lengths and flags in turn. */
  status(request: FakeRequest, context: number, extents: readonly number[], isLast = false): void {
    const data = Buffer.alloc(4 * extents.length)
    extents.forEach((value, index) => {
      data.writeUInt32BE(value, 4 * index)
    })
    this.chunk(request, 5, isLast, u32(context), data)
  }

  #step(): boolean {
    if (this.#stage === 'flags') {
      if (this.#received.length < 4) return false
      this.#take(4)
      this.#stage = 'options'
      return true
    }
    return this.#stage === 'options' ? this.#stepOption() : this.#stepRequest()
  }

  #stepOption(): boolean {
    if (this.#received.length < 16) return false
    const option = this.#received.readUInt32BE(8)
    const length = this.#received.readUInt32BE(12)
    if (this.#received.length < 16 + length) return false
    const payload = this.#take(16 + length).subarray(16)
    const reply = (type: number, ...parts: Buffer[]) => {
      const body = Buffer.concat(parts)
      this.send(
        Buffer.concat([
          Buffer.from('0003e889045565a9', 'hex'),
          u32(option),
          u32(type),
          u32(body.length),
          body,
        ]),
      )
    }
    const { size, flags = 0, blockSize, structured = true, contexts = {} } = this.#options.export
    if (option === 8) {
      reply(structured ? 1 : 0x80000001)
    } else if (option === 10) {
      for (const name of metaQueries(payload)) {
        const id = contexts[name]
        if (id !== undefined) reply(4, u32(id), Buffer.from(name))
      }
      reply(1)
    } else if (option === 7) {
      reply(3, u16(0), u64(size), u16(flags | HAS_FLAGS))
      if (blockSize) reply(3, u16(3), ...blockSize.map(u32))
      reply(1)
      this.#stage = 'requests'
    } else {
      reply(0x80000001)
    }
    return true
  }

  #stepRequest(): boolean {
    if (this.#received.length < 28) return false
    const header = this.#received
    const command = COMMANDS[header.readUInt16BE(6)]
    if (header.readUInt32BE(0) !== 0x25609513 || !command) throw new Error('the client sent no request')
    const length = header.readUInt32BE(24)
    const dataLength = command === 'write' ? length : 0
    if (header.length < 28 + dataLength) return false
    const bytes = Buffer.from(this.#take(28 + dataLength))
    const request: FakeRequest = {
      command,
      flags: bytes.readUInt16BE(4),
      cookie: bytes.subarray(8, 16),
      offset: Number(bytes.readBigUInt64BE(16)),
      length,
      data: bytes.subarray(28),
    }
    this.requests.push(request)
    if (command === 'disconnect') this.socket.end()
    else this.#options.onRequest?.(request, this)
    return true
  }

  #take(length: number): Buffer {
    const taken = this.#received.subarray(0, length)
    this.#received = this.#received.subarray(length)
    return taken
  }
}

function metaQueries(payload: Buffer): string[] {
  let at = 4 + payload.readUInt32BE(0)
  const count = payload.readUInt32BE(at)
  at += 4
  return Array.from({ length: count }, () => {
    const length = payload.readUInt32BE(at)
    at += 4 + length
    return payload.toString('utf8', at - length, at)
  })
}

export function u16(value: number): Buffer {
  const bytes = Buffer.alloc(2)
  bytes.writeUInt16BE(value)
  return bytes
}

export function u32(value: number): Buffer {
  const bytes = Buffer.alloc(4)
  bytes.writeUInt32BE(value)
  return bytes
}

export function u64(value: number | bigint): Buffer {
  const bytes = Buffer.alloc(8)
  bytes.writeBigUInt64BE(BigInt(value))
  return bytes
}

/** A disk of bytes that tell their place. */
export function patternDisk(size: number): Buffer {
  const disk = Buffer.alloc(size)
  for (let at = 0; at < size; at++) disk[at] = (at * 31 + (at >> 8) * 17 + (at >> 16)) & 0xff
  return disk
}

/** Answers reads from `disk` in one chunk, or simply; everything else succeeds. */
export function serveDisk(disk: Buffer, structured = true): NonNullable<FakeServerOptions['onRequest']> {
  return (request, connection) => {
    const { offset, length, command } = request
    if (command !== 'read') connection.simple(request)
    else if (structured) connection.data(request, offset, disk.subarray(offset, offset + length), true)
    else connection.simple(request, 0, disk.subarray(offset, offset + length))
  }
}

/** The head of a reply that sends a whole read in one chunk. */
export function dataHeader(request: FakeRequest): Buffer {
  const header = Buffer.alloc(28)
  header.writeUInt32BE(0x668e33ef, 0)
  header.writeUInt16BE(1, 4)
  header.writeUInt16BE(1, 6)
  request.cookie.copy(header, 8)
  header.writeUInt32BE(request.length + 8, 16)
  header.writeBigUInt64BE(BigInt(request.offset), 20)
  return header
}
