import { rm } from 'node:fs/promises'
import { createServer } from 'node:net'
import { describe, expect, it, vi } from 'vitest'
import { NbdClient } from '../src/index.ts'
import {
  dataHeader,
  type FakeConnection,
  type FakeExport,
  type FakeRequest,
  FakeServer,
  MULTI_CONN,
  patternDisk,
  SEND_FLUSH,
  SEND_FUA,
  serveDisk,
} from './fake-server.ts'

const disk = patternDisk(200_000)
const serve = serveDisk(disk)
const isDisk = (bytes: Buffer, offset: number) => bytes.equals(disk.subarray(offset, offset + bytes.length))

describe('a lost connection', () => {
  it('is opened again and its reads are replayed, also one that had half arrived', async () => {
    await using server = await FakeServer.start({
      export: { size: disk.length, contexts: { 'base:allocation': 1 } },
      onRequest: (request, connection) => {
        const isFirst = server.connections.length === 1
        if (!isFirst && request.command === 'blockStatus') connection.status(request, 1, [200_000, 0], true)
        else if (!isFirst) serve(request, connection)
        else if (request.offset === 100) {
          connection.data(request, 100, Buffer.alloc(60_000, 0xff))
          connection.socket.end()
        }
      },
    })
    await using client = await NbdClient.connect(server, { metaContexts: ['base:allocation'] })
    const reads = [0, 100, 7000].map(async offset => {
      const into = Buffer.alloc(100_000)
      await client.read(offset, into)
      expect(isDisk(into, offset)).toBe(true)
    })
    const maps = await client.mapExtents()
    await Promise.all(reads)
    expect(maps.get('base:allocation')?.count).toBe(1)
    expect(server.connections.length).toBe(2)
  })

  it('in the middle of a chunk that goes right into the memory of the caller is replayed from its beginning', async () => {
    const large = patternDisk(1 << 20)
    const memory = Buffer.alloc(large.length)
    await using server = await FakeServer.start({
      export: { size: large.length },
      onRequest: (request, connection) => {
        if (server.connections.length > 1) {
          serveDisk(large)(request, connection)
          return
        }
        connection.send(dataHeader(request))
        connection.send(Buffer.alloc(300_000, 0xff))
      },
    })
    await using client = await NbdClient.connect(server, { maxRequestBytes: large.length })
    const read = client.read(0, memory)
    await vi.waitUntil(() => memory[299_999] === 0xff)
    server.connections[0]?.socket.destroy()
    await read
    expect(memory.equals(large)).toBe(true)
    expect(server.requests.map(({ offset, length }) => [offset, length])).toEqual([
      [0, large.length],
      [0, large.length],
    ])
  })

  it('is opened again for the next call when nothing was outstanding', async () => {
    await using server = await FakeServer.start({ export: { size: disk.length }, onRequest: serve })
    await using client = await NbdClient.connect(server)
    const first = server.connections[0]?.socket
    const closed = new Promise(resolve => first?.once('close', resolve))
    first?.end()
    await closed
    const into = Buffer.alloc(1000)
    await client.read(5, into)
    expect(isDisk(into, 5)).toBe(true)
  })

  it('is made up for by the other connections', async () => {
    const dropped = new Set<FakeConnection>()
    await using server = await FakeServer.start({
      export: { size: disk.length, flags: MULTI_CONN },
      onRequest: (request, connection) => {
        // Every third connection dies with its first request.
        if (server.connections.indexOf(connection) % 3 === 1) {
          dropped.add(connection)
          connection.socket.destroy()
        } else setImmediate(() => serve(request, connection))
      },
    })
    await using client = await NbdClient.connect(server, { maxRequestBytes: 1000 })
    const into = Buffer.alloc(disk.length)
    await client.read(0, into)
    expect(isDisk(into, 0)).toBe(true)
    expect(dropped.size).toBeGreaterThan(0)
  })

  it('counts as lost when the server says that it is shutting down', async () => {
    await using server = await FakeServer.start({
      export: { size: disk.length },
      onRequest: (request, connection) => {
        if (server.connections.length === 1) connection.error(request, 108)
        else serve(request, connection)
      },
    })
    await using client = await NbdClient.connect(server)
    const into = Buffer.alloc(1000)
    await client.read(5, into)
    expect(isDisk(into, 5)).toBe(true)
    expect(server.connections.length).toBe(2)
  })

  it('ends a write with NBD_DISCONNECTED and never sends it twice', async () => {
    for (const change of ['write', 'writeZeroes', 'trim', 'flush'] as const) {
      await using server = await FakeServer.start({
        export: { size: disk.length, flags: SEND_FLUSH | 32 | 64 },
        onRequest: (request, connection) => {
          if (request.command === 'read') serve(request, connection)
          else connection.socket.destroy()
        },
      })
      await using client = await NbdClient.connect(server)
      const calls = {
        write: () => client.write(0, Buffer.alloc(1000)),
        writeZeroes: () => client.writeZeroes(0, 1000),
        trim: () => client.trim(0, 1000),
        flush: () => client.flush(),
      }
      await expect(calls[change](), change).rejects.toMatchObject({ code: 'NBD_DISCONNECTED' })
      await client.read(0, Buffer.alloc(100))
      expect(server.requests.map(({ command }) => command)).toEqual([change, 'read'])
    }
  })

  it('fails what was written and not flushed, since it may be lost too', async () => {
    await using server = await FakeServer.start({
      export: { size: disk.length, flags: SEND_FLUSH },
      onRequest: (request, connection) => {
        if (request.command === 'read' && server.connections.length === 1) connection.socket.destroy()
        else serve(request, connection)
      },
    })
    await using client = await NbdClient.connect(server)
    await client.write(0, Buffer.alloc(1000))
    await client.read(0, Buffer.alloc(1000))
    await expect(client.flush()).rejects.toMatchObject({ code: 'NBD_DISCONNECTED' })
    await expect(client.write(0, Buffer.alloc(1000))).rejects.toMatchObject({ code: 'NBD_DISCONNECTED' })
    await client.read(0, Buffer.alloc(1000))
  })

  it('loses nothing that was flushed or written through', async () => {
    await using server = await FakeServer.start({
      export: { size: disk.length, flags: SEND_FLUSH | SEND_FUA },
      onRequest: (request, connection) => {
        if (request.command === 'read' && server.connections.length === 1) connection.socket.destroy()
        else serve(request, connection)
      },
    })
    await using client = await NbdClient.connect(server)
    await client.write(0, Buffer.alloc(1000))
    await client.flush()
    await client.write(1000, Buffer.alloc(1000), { fua: true })
    await client.read(0, Buffer.alloc(1000))
    await client.write(0, Buffer.alloc(1000))
    await client.flush()
  })

  it('is given up when each new one is lost as well', async () => {
    await using server = await FakeServer.start({
      export: { size: disk.length },
      onRequest: (_request, connection) => connection.socket.destroy(),
    })
    await using client = await NbdClient.connect(server, { timeoutMs: 300 })
    await expect(client.read(0, Buffer.alloc(10))).rejects.toMatchObject({ code: 'NBD_DISCONNECTED' })
    expect(server.connections.length).toBeGreaterThan(2)
    expect(server.connections.length).toBeLessThan(10)
  })

  it('is given up when one request ends every connection that it is on, and the others are done', async () => {
    await using server = await FakeServer.start({
      export: { size: disk.length },
      onRequest: (request, connection) => {
        if (request.offset === 0) setImmediate(() => connection.socket.destroy())
        else serve(request, connection)
      },
    })
    await using client = await NbdClient.connect(server)
    let isOver = false
    const others = async () => {
      while (!isOver) await client.read(512, Buffer.alloc(512))
    }
    const busy = others()
    await expect(client.read(0, Buffer.alloc(10))).rejects.toMatchObject({ code: 'NBD_DISCONNECTED' })
    isOver = true
    await busy
    expect(server.connections.length).toBeLessThan(12)
  })

  it('is given up when the server is gone, and a later call tries again', async () => {
    await using server = await FakeServer.start({ export: { size: disk.length } })
    await using client = await NbdClient.connect(server, { timeoutMs: 200 })
    await rm(server.socketPath)
    server.connections[0]?.socket.destroy()
    const reads = [client.read(0, Buffer.alloc(10)), client.read(100, Buffer.alloc(10))]
    for (const read of reads) await expect(read).rejects.toMatchObject({ code: 'NBD_DISCONNECTED' })

    await using successor = await FakeServer.start({ export: { size: disk.length }, onRequest: serve })
    const forward = createServer(socket => {
      const to = successor.connect()
      socket.pipe(to).pipe(socket)
    })
    await new Promise<void>(resolve => forward.listen(server.socketPath, resolve))
    const into = Buffer.alloc(1000)
    await client.read(5, into)
    expect(isDisk(into, 5)).toBe(true)
    await client.close()
    await new Promise(resolve => forward.close(resolve))
  })

  const before: FakeExport = { size: disk.length, flags: 0, contexts: { 'base:allocation': 1, 'x:y': 2 } }
  it.each<[string, Partial<FakeExport>]>([
    ['size', { size: disk.length + 512 }],
    ['flags', { flags: SEND_FLUSH }],
    ['contexts', { contexts: { 'base:allocation': 1 } }],
    ['block sizes', { blockSize: [512, 4096, 65536] }],
    ['kind of replies', { structured: false }],
  ])('is not replaced by one whose export has another %s', async (_what, change) => {
    const exported: FakeExport = { ...before }
    await using server = await FakeServer.start({
      export: exported,
      onRequest: (_request, connection) => {
        Object.assign(exported, change)
        connection.socket.destroy()
      },
    })
    await using client = await NbdClient.connect(server, { metaContexts: ['base:allocation', 'x:y'] })
    await expect(client.read(0, Buffer.alloc(10))).rejects.toMatchObject({ code: 'NBD_CONNECT' })
    await expect(client.read(0, Buffer.alloc(10))).rejects.toMatchObject({ code: 'NBD_CONNECT' })
    expect(server.connections.length).toBe(2)
  })

  it('may come back with other ids of the same contexts', async () => {
    const exported: FakeExport = { size: 1024, contexts: { 'base:allocation': 1, 'x:y': 2 } }
    await using server = await FakeServer.start({
      export: exported,
      onRequest: (request, connection) => {
        if (server.connections.length === 1) {
          exported.contexts = { 'x:y': 1, 'base:allocation': 2 }
          connection.socket.destroy()
          return
        }
        connection.status(request, 1, [1024, 11])
        connection.status(request, 2, [1024, 22], true)
      },
    })
    await using client = await NbdClient.connect(server, { metaContexts: ['base:allocation', 'x:y'] })
    const maps = await client.mapExtents()
    expect([maps.get('x:y')?.flags(0), maps.get('base:allocation')?.flags(0)]).toEqual([11, 22])
  })

  it('leaves the work to the others when no additional one can be opened', async () => {
    const exported: FakeExport = { size: disk.length, flags: MULTI_CONN }
    const held: [FakeRequest, FakeConnection][] = []
    await using server = await FakeServer.start({
      export: exported,
      onRequest: (request, connection) => {
        held.push([request, connection])
        if (held.length < 64) return
        for (const [next, to] of held) setImmediate(() => serve(next, to))
        held.length = 0
      },
      send: (bytes, _isData, socket) => {
        if (server && socket !== server.connections[0]?.socket && server.connections.length > 0)
          socket.destroy()
        else socket.write(bytes)
      },
    })
    await using client = await NbdClient.connect(server, { maxRequestBytes: 100 })
    const into = Buffer.alloc(64_000)
    await client.read(0, into)
    expect(isDisk(into, 0)).toBe(true)
    expect(server.connections.length).toBe(2)
  })

  it('counts for all when an additional one has another export', async () => {
    const exported: FakeExport = { size: disk.length, flags: MULTI_CONN }
    await using server = await FakeServer.start({
      export: exported,
      onRequest: () => {
        exported.size = 512
      },
    })
    await using client = await NbdClient.connect(server, { maxRequestBytes: 1000 })
    const failure = client.read(0, Buffer.alloc(disk.length))
    await expect(failure).rejects.toMatchObject({ code: 'NBD_CONNECT', context: { changed: true } })
  })

  it('does not wait for an additional one that the server leaves hanging', async () => {
    await using server = await FakeServer.start({
      export: { size: disk.length, flags: MULTI_CONN },
      onRequest: (request, connection) => {
        // The first connection is lost as soon as the second, which hears nothing, is being opened.
        const loseFirst = () => {
          if (server.connections.length > 1) connection.socket.destroy()
          else setImmediate(loseFirst)
        }
        if (connection === server.connections[0]) loseFirst()
        else serve(request, connection)
      },
      send: (bytes, _isData, socket) => {
        const [first, second] = [...server.connections.map(connection => connection.socket), socket]
        if (socket === first || socket !== second) socket.write(bytes)
      },
    })
    await using client = await NbdClient.connect(server, { maxRequestBytes: 1000 })
    const into = Buffer.alloc(disk.length)
    await client.read(0, into)
    expect(isDisk(into, 0)).toBe(true)
  })
})

describe('closing', () => {
  it('tells the server, and may be done twice', async () => {
    await using server = await FakeServer.start({ export: { size: disk.length }, onRequest: serve })
    const client = await NbdClient.connect(server)
    await client.read(0, Buffer.alloc(100))
    await Promise.all([client.close(), client.close()])
    await client.close()
    expect(server.requests.map(({ command }) => command)).toEqual(['read', 'disconnect'])
    await expect(client.read(0, Buffer.alloc(1))).rejects.toMatchObject({ code: 'NBD_DISCONNECTED' })
  })

  it('ends what is outstanding, and also a search for a lost server', async () => {
    const { promise: isAsked, resolve: asked } = Promise.withResolvers<void>()
    await using server = await FakeServer.start({ export: { size: disk.length }, onRequest: () => asked() })
    const client = await NbdClient.connect(server)
    const calls = [client.read(0, Buffer.alloc(100)), client.read(0, Buffer.alloc(100_000))]
    const outcomes = Promise.allSettled([...calls])
    await isAsked
    calls.push(client.read(0, Buffer.alloc(100)))
    const unsent = expect(calls[2]).rejects.toMatchObject({ code: 'NBD_DISCONNECTED' })
    await client.close()
    await unsent
    for (const outcome of await outcomes)
      expect(outcome).toMatchObject({ reason: { code: 'NBD_DISCONNECTED' } })

    const other = await NbdClient.connect(server)
    await rm(server.socketPath)
    for (const connection of server.connections) connection.socket.destroy()
    const read = expect(other.read(0, Buffer.alloc(100))).rejects.toMatchObject({ code: 'NBD_DISCONNECTED' })
    await other.close()
    await read
  })

  it('does not wait for a server that does not hang up', async () => {
    await using server = await FakeServer.start({ export: { size: disk.length } })
    const client = await NbdClient.connect(server)
    server.connections[0]?.socket.pause()
    await client.close()
  })
})
