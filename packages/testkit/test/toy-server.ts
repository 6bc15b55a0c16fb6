import { once } from 'node:events'
import { type AddressInfo, createServer, type Server, type Socket } from 'node:net'
import { TEMPORARY_PREFIX } from '@varve/core'
import type { RawObject } from '@varve/testkit'
import { frame, frames, message } from './toy-frames.ts'

const CHUNK_SIZE = 64 * 1024

/** What a driver asks of a {@link ToyServer}: one request a connection. */
export interface ToyRequest {
  op: 'hello' | 'put' | 'drop' | 'get' | 'stat' | 'list' | 'delete' | 'cleanUp'
  space: string
  password: string
  key: string
  /** Of an upload. */
  id: string
  range?: { start: number; end: number }
  /** In milliseconds. */
  olderThan?: number
}

/** An object of a {@link ToyServer}. */
export interface ToyObject {
  readonly id: string
  readonly bytes: Buffer
  readonly modifiedAt: number
}

/** Keeps what a server holds of one driver. */
export class ToySpace {
  readonly objects = new Map<string, ToyObject>()
  /** Uploads that are not whole, by id: when they began. They stay until they are dropped. */
  readonly unfinished = new Map<string, number>()

  inspect(): RawObject[] {
    return [
      ...Array.from(this.objects, ([name, { bytes }]) => ({ name, size: bytes.length })),
      ...Array.from(this.unfinished, ([id]) => ({ name: TEMPORARY_PREFIX + id, size: 0 })),
    ]
  }
}

/** A server that keeps objects in memory, as little of one as can be written. */
export class ToyServer {
  readonly spaces = new Map<string, ToySpace>()
  readonly #password: string
  readonly #sockets = new Set<Socket>()
  #server: Server | undefined
  port = 0

  constructor(password: string) {
    this.#password = password
  }

  space(name: string): ToySpace {
    const space = this.spaces.get(name) ?? new ToySpace()
    this.spaces.set(name, space)
    return space
  }

  async start(): Promise<void> {
    this.#server = createServer(socket => {
      this.#sockets.add(socket)
      socket.on('close', () => this.#sockets.delete(socket))
      socket.on('error', () => undefined)
      this.#serve(socket).catch(() => socket.destroy())
    })
    this.#server.listen(this.port, '127.0.0.1')
    await once(this.#server, 'listening')
    this.port = (this.#server.address() as AddressInfo).port
  }

  /** Stops at once, in the middle of whatever it does, and keeps what it holds. */
  async kill(): Promise<void> {
    const server = this.#server
    if (server === undefined) return
    this.#server = undefined
    server.close()
    for (const socket of this.#sockets) socket.resetAndDestroy()
    await once(server, 'close')
  }

  async #serve(socket: Socket): Promise<void> {
    const incoming = frames(socket)
    const { value: first } = await incoming.next()
    if (first === undefined) return
    const request: ToyRequest = JSON.parse(first.toString())
    const { key, id, range } = request
    const space = this.spaces.get(request.space)
    if (request.password !== this.#password) return void socket.end(message({ error: 'denied' }))
    if (space === undefined) return void socket.end(message({ error: 'missing' }))
    const object = space.objects.get(key)
    switch (request.op) {
      case 'put':
        return this.#take(socket, incoming, space, request)
      case 'get': {
        if (object === undefined) return void socket.end(message({ error: 'none' }))
        const bytes = object.bytes.subarray(range?.start ?? 0, range?.end)
        socket.write(message({}))
        for (let at = 0; at < bytes.length; at += CHUNK_SIZE) {
          if (!socket.write(frame(bytes.subarray(at, at + CHUNK_SIZE)))) await once(socket, 'drain')
        }
        return void socket.end(frame(''))
      }
      case 'stat':
        return void socket.end(message({ object: object && describe(key, object) }))
      case 'list':
        socket.write(message({}))
        for (const [name, found] of space.objects) {
          if (name.startsWith(key)) socket.write(message(describe(name, found)))
        }
        return void socket.end(frame(''))
      case 'delete':
        space.objects.delete(key)
        break
      case 'drop':
        space.unfinished.delete(id)
        break
      case 'cleanUp': {
        const old = [...space.unfinished].filter(([, began]) => began < (request.olderThan ?? 0))
        for (const [name] of old) space.unfinished.delete(name)
        return void socket.end(message({ removed: old.length }))
      }
    }
    socket.end(message({}))
  }

  async #take(
    socket: Socket,
    incoming: AsyncGenerator<Buffer, undefined>,
    space: ToySpace,
    { key, id }: ToyRequest,
  ): Promise<void> {
    space.unfinished.set(id, Date.now())
    const chunks: Buffer[] = []
    for (;;) {
      const { value: chunk } = await incoming.next()
      if (chunk === undefined) return // it stays unfinished
      if (chunk.length === 0) break
      chunks.push(Buffer.from(chunk))
    }
    if (!space.unfinished.delete(id)) return // dropped meanwhile
    space.objects.set(key, { id, bytes: Buffer.concat(chunks), modifiedAt: Date.now() })
    socket.end(message({}))
  }
}

function describe(key: string, { id, bytes, modifiedAt }: ToyObject) {
  return { key, id, size: bytes.length, modifiedAt }
}
