import { getEventListeners } from 'node:events'
import { stat } from 'node:fs/promises'
import { setImmediate as turn } from 'node:timers/promises'
import { afterEach, describe, expect, it, vi } from 'vitest'
import { NbdClient } from '../src/index.ts'
import {
  dataHeader,
  type FakeConnection,
  type FakeRequest,
  FakeServer,
  MULTI_CONN,
  patternDisk,
  SEND_FLUSH,
  SEND_FUA,
  serveDisk,
  u32,
  u64,
} from './fake-server.ts'

const disk = patternDisk(1 << 20)
const serve = serveDisk(disk)
const oneRequest = { maxRequestBytes: disk.length }

/** A server that answers only when a test says so. */
async function heldServer() {
  const requests: FakeRequest[] = []
  const waiting: (() => void)[] = []
  const server = await FakeServer.start({
    export: { size: disk.length, flags: SEND_FLUSH | SEND_FUA },
    onRequest: request => {
      requests.push(request)
      for (const wake of waiting.splice(0)) wake()
    },
  })
  const connection = (): FakeConnection => {
    const last = server.connections.at(-1)
    if (!last) throw new Error('no client is connected')
    return last
  }
  const received = async (count: number): Promise<void> => {
    while (requests.length < count) await new Promise<void>(resolve => waiting.push(resolve))
  }
  return {
    server,
    requests,
    connection,
    received,
    [Symbol.asyncDispose]: () => server[Symbol.asyncDispose](),
  }
}

describe('a signal', () => {
  it('ends a call at once, whether it was sent, half sent or not sent', async () => {
    await using lab = await heldServer()
    await using client = await NbdClient.connect(lab.server)
    const controller = new AbortController()
    const reason = new Error('enough')
    const options = { signal: controller.signal }
    const calls = [
      client.read(0, Buffer.alloc(512), options),
      client.write(0, Buffer.alloc(512), options),
      client.read(0, Buffer.alloc(disk.length), options),
      ...Array.from({ length: 100 }, () => client.read(0, Buffer.alloc(512), options)),
    ]
    const outcomes = Promise.allSettled(calls)
    await lab.received(3)
    expect(getEventListeners(controller.signal, 'abort').length).toBe(1)
    controller.abort(reason)
    for (const outcome of await outcomes)
      expect(outcome).toMatchObject({ reason: { name: 'NbdError', code: 'NBD_ABORTED', cause: reason } })
  })

  it('is not held on to by calls that are done', async () => {
    await using server = await FakeServer.start({ export: { size: disk.length }, onRequest: serve })
    await using client = await NbdClient.connect(server)
    const { signal } = new AbortController()
    await Promise.all([
      client.read(0, Buffer.alloc(512), { signal }),
      client.read(0, Buffer.alloc(5), { signal }),
    ])
    expect(getEventListeners(signal, 'abort')).toEqual([])
  })

  it('that is already aborted sends nothing', async () => {
    await using lab = await heldServer()
    await using client = await NbdClient.connect(lab.server)
    const call = client.read(0, Buffer.alloc(512), { signal: AbortSignal.abort() })
    await expect(call).rejects.toMatchObject({ code: 'NBD_ABORTED' })
    expect(lab.requests).toEqual([])
  })

  it('leaves other calls and the connection alone, and the memory to its owner', async () => {
    await using lab = await heldServer()
    await using client = await NbdClient.connect(lab.server)
    const controller = new AbortController()
    const memory = Buffer.alloc(4096)
    const given = client.read(0, memory, { signal: controller.signal })
    const kept = Buffer.alloc(4096)
    const other = client.read(8192, kept)
    await lab.received(2)
    controller.abort()
    await expect(given).rejects.toMatchObject({ code: 'NBD_ABORTED' })
    memory.fill(0xee)
    for (const request of lab.requests) serve(request, lab.connection())
    await other
    expect(kept.equals(disk.subarray(8192, 12_288))).toBe(true)
    expect(memory.every(byte => byte === 0xee)).toBe(true)
    expect(lab.server.connections.length).toBe(1)
  })

  it('in the middle of a large chunk takes the memory back before the call ends', async () => {
    await using lab = await heldServer()
    await using client = await NbdClient.connect(lab.server, oneRequest)
    const controller = new AbortController()
    const memory = Buffer.alloc(disk.length)
    const given = client.read(0, memory, { signal: controller.signal })
    await lab.received(1)
    const [request] = lab.requests
    if (!request) throw new Error('no request')
    // The socket is receiving right into the caller's memory, and the server stalls.
    lab.connection().send(dataHeader(request))
    lab.connection().send(disk.subarray(0, 300_000))
    await vi.waitUntil(() => memory[299_999] === disk[299_999])
    controller.abort()
    await expect(given).rejects.toMatchObject({ code: 'NBD_ABORTED' })
    const before = Buffer.from(memory)
    lab.connection().send(disk.subarray(300_000))
    const into = Buffer.alloc(512)
    const next = client.read(0, into)
    await lab.received(2)
    const again = lab.requests[1]
    if (again) serve(again, lab.connection())
    await next
    expect(memory.equals(before)).toBe(true)
    expect(into.equals(disk.subarray(0, 512))).toBe(true)
  })

  it('in the middle of a large chunk keeps the connection when the server goes on', async () => {
    await using lab = await heldServer()
    await using client = await NbdClient.connect(lab.server, oneRequest)
    const controller = new AbortController()
    const memory = Buffer.alloc(disk.length)
    const given = client.read(0, memory, { signal: controller.signal })
    await lab.received(1)
    const [request] = lab.requests
    if (!request) throw new Error('no request')
    lab.connection().send(dataHeader(request))
    lab.connection().send(disk.subarray(0, 300_000))
    await vi.waitUntil(() => memory[299_999] === disk[299_999])
    controller.abort()
    lab.connection().send(disk.subarray(300_000, 300_001))
    await expect(given).rejects.toMatchObject({ code: 'NBD_ABORTED' })
    memory.fill(0xee)
    lab.connection().send(disk.subarray(300_001))
    const into = Buffer.alloc(512)
    const next = client.read(0, into)
    await lab.received(2)
    const again = lab.requests[1]
    if (again) serve(again, lab.connection())
    await next
    expect(into.equals(disk.subarray(0, 512))).toBe(true)
    expect(memory.every(byte => byte === 0xee)).toBe(true)
    expect(lab.server.connections.length).toBe(1)
  })
})

describe('a signal, while a write is being sent', () => {
  const large = Buffer.alloc(3 << 20, 0x11)

  afterEach(() => {
    vi.useRealTimers()
  })

  it('ends the call when no socket has the memory any more, at the cost of the connection', async () => {
    await using server = await FakeServer.start({ export: { size: large.length } })
    await using client = await NbdClient.connect(server)
    const memory = Buffer.from(large)
    const controller = new AbortController()
    const socket = server.connections[0]?.socket
    socket?.pause()
    const write = client.write(0, memory, { signal: controller.signal })
    let isOver = false
    const outcome = expect(write)
      .rejects.toMatchObject({ code: 'NBD_ABORTED' })
      .finally(() => {
        isOver = true
      })
    await turn()
    controller.abort()
    await turn()
    expect(isOver).toBe(false)
    await outcome
    memory.fill(0xee)
    const closed = new Promise(resolve => socket?.once('close', resolve))
    socket?.resume()
    await closed
    expect(server.requests.length).toBeLessThan(large.length / (256 * 1024))
    for (const { data } of server.requests) expect(data.every(byte => byte === 0x11)).toBe(true)
  })

  it('keeps the connection when the server takes the rest', async () => {
    vi.useFakeTimers({ toFake: ['setTimeout', 'clearTimeout'] }) // a busy machine may be slow
    await using server = await FakeServer.start({
      export: { size: large.length },
      onRequest: (request, connection) =>
        connection.simple(request, 0, request.command === 'read' ? Buffer.alloc(request.length) : undefined),
    })
    await using client = await NbdClient.connect(server)
    const memory = Buffer.from(large)
    const controller = new AbortController()
    server.connections[0]?.socket.pause()
    const write = client.write(0, memory, { signal: controller.signal })
    await turn()
    controller.abort()
    server.connections[0]?.socket.resume()
    await expect(write).rejects.toMatchObject({ code: 'NBD_ABORTED' })
    memory.fill(0xee)
    await client.write(0, Buffer.alloc(512))
    expect(server.connections.length).toBe(1)
    for (const { data } of server.requests.slice(0, -1)) expect(data.every(byte => byte === 0x11)).toBe(true)
  })

  it('is not put off by a reply that comes before all was sent', async () => {
    await using server = await FakeServer.start({ export: { size: large.length } })
    await using client = await NbdClient.connect(server, { maxRequestBytes: large.length })
    const controller = new AbortController()
    server.connections[0]?.socket.pause()
    const write = client.write(0, Buffer.from(large), { signal: controller.signal })
    await turn()
    controller.abort()
    // The first request of a connection has the cookie 1.
    server.connections[0]?.send(Buffer.concat([u32(0x67446698), u32(0), u64(1)]))
    await expect(write).rejects.toMatchObject({ code: 'NBD_ABORTED' })
    expect(server.requests.length).toBe(0)
  })

  it('ends it in the same way when another connection is lost, and nothing may be written any more', async () => {
    const { promise: isLost, resolve: lost } = Promise.withResolvers<void>()
    await using server = await FakeServer.start({
      export: { size: 1 << 26, flags: MULTI_CONN },
      onRequest: (request, connection) => {
        // The second connection acknowledges one write, which nobody has flushed.
        connection.simple(request)
        connection.socket.end(() => lost())
      },
    })
    await using client = await NbdClient.connect(server, { connections: 2 })
    const memory = Buffer.alloc(1 << 26, 0x11)
    const socket = server.connections[0]?.socket
    socket?.pause()
    const write = expect(client.write(0, memory)).rejects.toMatchObject({ code: 'NBD_DISCONNECTED' })
    await isLost
    await write
    memory.fill(0xee)
    const closed = new Promise(resolve => socket?.once('close', resolve))
    socket?.resume()
    await closed
    for (const { data } of server.requests) expect(data.every(byte => byte === 0x11)).toBe(true)
  })
})

describe('a signal, before this process stood still', () => {
  it('keeps the connection when the server has gone on meanwhile', async () => {
    await using lab = await heldServer()
    await using client = await NbdClient.connect(lab.server, oneRequest)
    const controller = new AbortController()
    const memory = Buffer.alloc(disk.length)
    const given = client.read(0, memory, { signal: controller.signal })
    await lab.received(1)
    const [request] = lab.requests
    if (!request) throw new Error('no request')
    const almost = disk.length - 50_000
    lab.connection().send(dataHeader(request))
    lab.connection().send(disk.subarray(0, almost))
    await vi.waitUntil(() => memory[almost - 1] === disk[almost - 1])
    await stat('/') // what follows an answer of the system comes before timers, and those before what is received later
    controller.abort()
    lab.connection().send(disk.subarray(almost))
    for (const until = performance.now() + 400; performance.now() < until; );
    await expect(given).rejects.toMatchObject({ code: 'NBD_ABORTED' })
    const next = client.read(0, Buffer.alloc(512))
    await lab.received(2)
    const again = lab.requests[1]
    if (again) serve(again, lab.connection())
    await next
    expect(lab.server.connections.length).toBe(1)
  })
})

describe('a signal, after the connection was lost in the middle of a large chunk', () => {
  it('ends the call, whose memory nobody holds any more', async () => {
    await using lab = await heldServer()
    await using client = await NbdClient.connect(lab.server, oneRequest)
    const controller = new AbortController()
    const calls = [
      client.read(0, Buffer.alloc(512), { signal: controller.signal }),
      client.read(0, Buffer.alloc(disk.length), { signal: controller.signal }),
    ]
    const outcomes = Promise.allSettled(calls)
    await lab.received(2)
    const [first, second] = lab.requests
    if (!first || !second) throw new Error('no requests')
    // Both arrive at once: the good-bye, and the beginning of what would have been received into the memory.
    const connection = lab.connection()
    connection.socket.cork()
    connection.error(first, 108)
    connection.send(dataHeader(second))
    connection.send(disk.subarray(0, 10_000))
    connection.socket.uncork()
    await new Promise(resolve => connection.socket.once('close', resolve))
    controller.abort()
    for (const outcome of await outcomes) expect(outcome).toMatchObject({ reason: { code: 'NBD_ABORTED' } })
  })
})

describe('the timeout', () => {
  afterEach(() => {
    vi.useRealTimers()
  })

  it('ends all calls on a connection whose oldest request makes no progress', async () => {
    vi.useFakeTimers({ toFake: ['setInterval', 'clearInterval'] })
    await using lab = await heldServer()
    await using client = await NbdClient.connect(lab.server, { timeoutMs: 8000 })
    const calls = [client.read(0, Buffer.alloc(512)), client.write(512, Buffer.alloc(512))]
    const outcomes = Promise.allSettled(calls)
    await lab.received(2)
    vi.advanceTimersByTime(8500)
    await new Promise(resolve => setImmediate(resolve))
    expect(lab.server.connections[0]?.socket.destroyed).toBe(false)
    vi.advanceTimersByTime(600)
    for (const outcome of await outcomes) expect(outcome).toMatchObject({ reason: { code: 'NBD_TIMEOUT' } })
  })

  it('begins again with every part of a reply, and with every reply for the next request', async () => {
    vi.useFakeTimers({ toFake: ['setInterval', 'clearInterval'] })
    await using lab = await heldServer()
    await using client = await NbdClient.connect(lab.server, { timeoutMs: 8000 })
    const memory = Buffer.alloc(100_000)
    const first = client.read(0, memory)
    let isSecondDone = false
    const second = client.read(0, Buffer.alloc(10)).then(() => {
      isSecondDone = true
    })
    await lab.received(2)
    const [one, two] = lab.requests
    if (!one || !two) throw new Error('no requests')
    for (let at = 0; at < 100_000; at += 20_000) {
      vi.advanceTimersByTime(7000)
      lab.connection().data(one, at, disk.subarray(at, at + 20_000), at === 80_000)
      await vi.waitUntil(() => memory[at + 19_999] === disk[at + 19_999])
    }
    await first
    expect(isSecondDone).toBe(false)
    vi.advanceTimersByTime(7000)
    serve(two, lab.connection())
    await second
  })

  it('is not put off by replies to younger requests', async () => {
    vi.useFakeTimers({ toFake: ['setInterval', 'clearInterval'] })
    await using lab = await heldServer()
    await using client = await NbdClient.connect(lab.server, { timeoutMs: 8000 })
    const starved = expect(client.read(0, Buffer.alloc(512))).rejects.toMatchObject({ code: 'NBD_TIMEOUT' })
    for (let round = 1; round <= 3; round++) {
      const younger = client.read(512, Buffer.alloc(512))
      await lab.received(1 + round)
      vi.advanceTimersByTime(2900)
      const request = lab.requests[round]
      if (request) serve(request, lab.connection())
      await younger
    }
    vi.advanceTimersByTime(500)
    await starved
  })

  it.each([
    ['a flush', (client: NbdClient) => client.flush()],
    [
      'a write that is to be durable',
      (client: NbdClient) => client.write(0, Buffer.alloc(512), { fua: true }),
    ],
  ])('is another one for %s, and the old one for what follows', async (_what, call) => {
    vi.useFakeTimers({ toFake: ['setInterval', 'clearInterval'] })
    await using lab = await heldServer()
    await using client = await NbdClient.connect(lab.server, { timeoutMs: 8000, flushTimeoutMs: 80_000 })
    let isSlowDone = false
    const slow = call(client).then(() => {
      isSlowDone = true
    })
    const read = expect(client.read(0, Buffer.alloc(512))).rejects.toMatchObject({
      code: 'NBD_TIMEOUT',
      context: { timeoutMs: 8000 },
    })
    await lab.received(2)
    vi.advanceTimersByTime(79_000)
    await turn()
    expect(isSlowDone).toBe(false)
    const [request] = lab.requests
    if (request) lab.connection().simple(request)
    await slow
    vi.advanceTimersByTime(9100)
    await read

    const dead = expect(call(client)).rejects.toMatchObject({
      code: 'NBD_TIMEOUT',
      context: { timeoutMs: 80_000 },
    })
    await lab.received(3)
    vi.advanceTimersByTime(82_000)
    await dead
  })

  it('does not run while nothing is asked', async () => {
    vi.useFakeTimers({ toFake: ['setInterval', 'clearInterval'] })
    await using lab = await heldServer()
    await using client = await NbdClient.connect(lab.server, { timeoutMs: 8000 })
    const answer = async (count: number) => {
      const call = client.read(0, Buffer.alloc(512))
      await lab.received(count)
      const request = lab.requests[count - 1]
      if (request) serve(request, lab.connection())
      await call
    }
    await answer(1)
    vi.advanceTimersByTime(100_000)
    expect(vi.getTimerCount()).toBe(0)
    await answer(2)
    expect(lab.server.connections.length).toBe(1)
  })
})
