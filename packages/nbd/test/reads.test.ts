import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { NbdClient } from '../src/index.ts'
import {
  type FakeConnection,
  type FakeRequest,
  FakeServer,
  MULTI_CONN,
  patternDisk,
  serveDisk,
  u16,
  u32,
  u64,
} from './fake-server.ts'

const disk = patternDisk(300_000)
disk.fill(0, 100_000, 140_000)

interface Piece {
  request: FakeRequest
  start: number
  end: number
}

/** Answers all `requests` with chunks that are cut, mixed and ordered at random. */
function answerInPieces(requests: FakeRequest[], connection: FakeConnection, random: () => number): void {
  const pieces: Piece[] = []
  for (const request of requests) {
    const end = request.offset + request.length
    for (let start = request.offset; start < end; ) {
      const stop = Math.min(end, start + 1 + (random() % (random() % 2 === 0 ? 10_000 : 300_000)))
      pieces.push({ request, start, end: stop })
      start = stop
    }
  }
  const shuffled = pieces.map(piece => ({ piece, key: random() })).sort((a, b) => a.key - b.key)
  const left = new Map(
    requests.map(request => [request, pieces.filter(piece => piece.request === request).length]),
  )
  for (const { piece } of shuffled) {
    const { request, start, end } = piece
    const remaining = (left.get(request) ?? 0) - 1
    left.set(request, remaining)
    const endsWithNone = random() % 2 === 0
    const isLast = remaining === 0 && !endsWithNone
    const bytes = disk.subarray(start, end)
    if (bytes.every(byte => byte === 0)) connection.hole(request, start, end - start, isLast)
    else connection.data(request, start, bytes, isLast)
    if (remaining === 0 && endsWithNone) connection.none(request)
  }
}

describe('reading', () => {
  it('gets the right bytes from replies in pieces, out of order, with holes, however they are cut', async () => {
    const read = fc.tuple(fc.nat(disk.length), fc.nat(disk.length))
    await fc.assert(
      fc.asyncProperty(
        fc.array(read, { minLength: 1, maxLength: 6 }),
        fc.constantFrom(1, 512, 4096),
        fc.constantFrom(4096, 50_000, 1 << 20),
        fc.infiniteStream(fc.nat()),
        async (reads, minimum, maxRequestBytes, stream) => {
          const random = () => stream.next().value ?? 0
          let held: FakeRequest[] = []
          await using server = await FakeServer.start({
            export: { size: disk.length, blockSize: [minimum, 4096, 1 << 22] },
            onRequest: (request, connection) => {
              held.push(request)
              if (held.length > 1) return
              setImmediate(() => {
                const requests = held
                held = []
                answerInPieces(requests, connection, random)
              })
            },
            send: (bytes, _isData, socket) => {
              const cut = random() % (bytes.length + 1)
              socket.write(bytes.subarray(0, cut))
              socket.write(bytes.subarray(cut))
            },
          })
          await using client = await NbdClient.connect(server, { maxRequestBytes })
          const outcomes = reads.map(async ([a, b]) => {
            const [start, end] = [Math.min(a, b), Math.max(a, b)]
            const into = Buffer.alloc(end - start, 0xee)
            await client.read(start, into)
            expect(into.equals(disk.subarray(start, end))).toBe(true)
          })
          await Promise.all(outcomes)
          for (const { offset, length } of server.requests) {
            expect(offset % minimum).toBe(0)
            expect(length % minimum === 0 || offset + length === disk.length).toBe(true)
          }
        },
      ),
      { numRuns: 60 },
    )
  }, 60_000)

  it('takes a reply in single bytes', async () => {
    await using server = await FakeServer.start({
      export: { size: disk.length },
      onRequest: (request, connection) => {
        const end = request.offset + request.length
        for (let at = request.offset; at < end; at++)
          connection.data(request, at, disk.subarray(at, at + 1), at === end - 1)
      },
    })
    await using client = await NbdClient.connect(server)
    const into = Buffer.alloc(3000)
    await client.read(5, into)
    expect(into.equals(disk.subarray(5, 3005))).toBe(true)
  })

  it('touches no byte beside those it was asked for', async () => {
    await using server = await FakeServer.start({
      export: { size: disk.length, blockSize: [512, 4096, 8192] },
      onRequest: serveDisk(disk),
    })
    await using client = await NbdClient.connect(server)
    const memory = Buffer.alloc(50_000, 0xee)
    await client.read(1001, memory.subarray(700, 40_000))
    expect(memory.subarray(0, 700).every(byte => byte === 0xee)).toBe(true)
    expect(memory.subarray(40_000).every(byte => byte === 0xee)).toBe(true)
    expect(memory.subarray(700, 40_000).equals(disk.subarray(1001, 40_301))).toBe(true)
  })

  it('asks for nothing when nothing is to be read', async () => {
    await using server = await FakeServer.start({ export: { size: 1000 } })
    await using client = await NbdClient.connect(server)
    await client.read(1000, Buffer.alloc(0))
    expect(server.requests).toEqual([])
  })

  it('sends the reads of one turn in one piece', async () => {
    await using server = await FakeServer.start({ export: { size: disk.length }, onRequest: serveDisk(disk) })
    await using client = await NbdClient.connect(server)
    const pieces: number[] = []
    server.connections[0]?.socket.on('data', bytes => pieces.push(bytes.length))
    await Promise.all(Array.from({ length: 50 }, (_, index) => client.read(index, Buffer.alloc(10))))
    expect(pieces).toEqual([50 * 28])
  })

  it('keeps at most 64 requests and about 4 MiB in flight on a connection', async () => {
    const most = { requests: 0, bytes: 0 }
    const held: FakeRequest[] = []
    await using server = await FakeServer.start({
      export: { size: 2 ** 40 },
      onRequest: (request, connection) => {
        held.push(request)
        most.requests = Math.max(most.requests, held.length)
        most.bytes = Math.max(
          most.bytes,
          held.reduce((sum, { length }) => sum + length, 0),
        )
        // Answers one at a time, after the client had its chance to send more.
        if (held.length > 1) return
        const answer = () => {
          const next = held.shift()
          if (next) connection.hole(next, next.offset, next.length, true)
          if (held.length > 0) setImmediate(answer)
        }
        setImmediate(answer)
      },
    })
    await using client = await NbdClient.connect(server)
    await client.read(2 ** 39, Buffer.alloc(32 * 2 ** 20))
    expect(most.bytes).toBe(4 * 2 ** 20)
    most.requests = 0
    await Promise.all(Array.from({ length: 500 }, (_, index) => client.read(index * 512, Buffer.alloc(512))))
    expect(most.requests).toBe(64)
  })

  it('uses several connections where the server keeps them coherent, and only there', async () => {
    for (const [flags, used] of [
      [MULTI_CONN, 3],
      [0, 1],
    ] as const) {
      await using server = await FakeServer.start({
        export: { size: disk.length, flags },
        // Nothing is answered before all connections have something to answer.
        onRequest: (request, connection) => {
          const answer = () => {
            if (server.connections.filter(({ requests }) => requests.length > 0).length < used)
              setImmediate(answer)
            else serveDisk(disk)(request, connection)
          }
          setImmediate(answer)
        },
      })
      await using client = await NbdClient.connect(server, { connections: 3, maxRequestBytes: 1000 })
      const into = Buffer.alloc(disk.length)
      await client.read(0, into)
      expect(into.equals(disk)).toBe(true)
      expect(server.connections.length).toBe(used)
    }
  })

  it('fails with the error of the server, and only the read that it was for', async () => {
    await using server = await FakeServer.start({
      export: { size: disk.length },
      onRequest: (request, connection) => {
        if (request.offset < 1000) connection.error(request, 5, 'bad\nsector')
        else serveDisk(disk)(request, connection)
      },
    })
    await using client = await NbdClient.connect(server)
    const bad = client.read(512, Buffer.alloc(512))
    const good = client.read(1024, Buffer.alloc(512))
    await expect(bad).rejects.toMatchObject({
      code: 'NBD_SERVER',
      errno: 'EIO',
      message: 'The NBD server failed a read of 512 bytes at 512 with EIO (bad sector).',
      context: { command: 'read', offset: 512, length: 512, errorNumber: 5 },
    })
    await good
    await client.read(2048, Buffer.alloc(512))
  })

  it('waits for the rest of a failed read before it tells, so that its memory is free', async () => {
    const held: (() => void)[] = []
    await using server = await FakeServer.start({
      export: { size: disk.length },
      onRequest: (request, connection) => {
        if (request.offset === 0) connection.error(request, 5)
        else held.push(() => serveDisk(disk)(request, connection))
        if (held.length === 2) for (const answer of held) setImmediate(answer)
      },
    })
    await using client = await NbdClient.connect(server, { maxRequestBytes: 1000 })
    const into = Buffer.alloc(3000)
    await expect(client.read(0, into)).rejects.toMatchObject({ errno: 'EIO' })
    expect(into.subarray(1000).equals(disk.subarray(1000, 3000))).toBe(true)
  })

  it('fails where a part of a block at its edge fails', async () => {
    for (const bad of [0, 512, 1536]) {
      await using server = await FakeServer.start({
        export: { size: disk.length, blockSize: [512, 4096, 4096] },
        onRequest: (request, connection) => {
          if (request.offset === bad) connection.error(request, 5)
          else serveDisk(disk)(request, connection)
        },
      })
      await using client = await NbdClient.connect(server)
      const failure = client.read(100, Buffer.alloc(1500))
      await expect(failure, `block ${bad}`).rejects.toMatchObject({ code: 'NBD_SERVER', errno: 'EIO' })
    }
  })

  it('takes the longest error that there can be', async () => {
    await using server = await FakeServer.start({
      export: { size: disk.length },
      onRequest: (request, connection) => {
        const text = Buffer.alloc(4096, 'x')
        const frame = Buffer.concat([u32(5), u16(4096), text, u64(request.offset)])
        connection.chunk(request, 0x8002, true, frame)
      },
    })
    await using client = await NbdClient.connect(server)
    const failure = await client.read(0, Buffer.alloc(512)).catch(error => error)
    expect(failure).toMatchObject({ code: 'NBD_SERVER', errno: 'EIO' })
    expect(failure.message.length).toBeLessThan(400)
  })

  it('takes an error in the middle of a reply, and one of a kind it does not know', async () => {
    await using server = await FakeServer.start({
      export: { size: disk.length },
      onRequest: (request, connection) => {
        const { offset } = request
        connection.data(request, offset, disk.subarray(offset, offset + 100))
        if (offset === 0) connection.error(request, 28, 'full', false)
        else connection.chunk(request, 0x8123, false, Buffer.from('0000000c0000ffff', 'hex'))
        connection.none(request)
      },
    })
    await using client = await NbdClient.connect(server)
    await expect(client.read(0, Buffer.alloc(512))).rejects.toMatchObject({ errno: 'ENOSPC' })
    await expect(client.read(512, Buffer.alloc(512))).rejects.toMatchObject({ errno: 'ENOMEM' })
  })

  it('calls an error that the protocol does not know EINVAL', async () => {
    await using server = await FakeServer.start({
      export: { size: 1000 },
      onRequest: (request, connection) => connection.simple(request, 4242),
    })
    await using client = await NbdClient.connect(server)
    const failure = client.read(0, Buffer.alloc(10))
    await expect(failure).rejects.toMatchObject({ errno: 'EINVAL', context: { errorNumber: 4242 } })
  })

  it.each([
    ['behind the end', 990, 11],
    ['at a negative offset', -1, 1],
    ['at a broken offset', 0.5, 1],
    ['at no number', Number.NaN, 1],
  ])('refuses a range %s', async (_what, offset, length) => {
    await using server = await FakeServer.start({ export: { size: 1000 } })
    await using client = await NbdClient.connect(server)
    await expect(client.read(offset, Buffer.alloc(length))).rejects.toMatchObject({ code: 'NBD_ARGUMENT' })
    expect(server.requests).toEqual([])
  })
})
