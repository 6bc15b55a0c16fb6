import { once } from 'node:events'
import { type AddressInfo, connect, createServer, type Server, type Socket } from 'node:net'
import { buffer } from 'node:stream/consumers'
import { setTimeout as delay } from 'node:timers/promises'
import { NetworkProxy, patternBytes } from '@varve/testkit'
import { describe, expect, onTestFinished, test, vi } from 'vitest'

/** A server that does `serve` with each connection, a proxy in front of it, and connections through the proxy. */
async function network(serve: (socket: Socket) => void) {
  const sockets = new Set<Socket>()
  const server = createServer({ allowHalfOpen: true }, socket => {
    sockets.add(socket)
    socket.on('error', () => undefined)
    serve(socket)
  })
  const port = await listen(server)
  const proxy = await NetworkProxy.start({ port })
  onTestFinished(async () => {
    await proxy[Symbol.asyncDispose]()
    for (const socket of sockets) socket.destroy()
    server.close()
  })
  return { proxy, server, port, sockets }
}

async function listen(server: Server, port = 0): Promise<number> {
  server.listen(port, '127.0.0.1')
  await once(server, 'listening')
  return (server.address() as AddressInfo).port
}

function through(proxy: NetworkProxy): Socket {
  const client = connect({ port: proxy.port, host: '127.0.0.1', allowHalfOpen: true })
  onTestFinished(() => void client.destroy())
  return client.on('error', () => undefined)
}

/** What a socket gives until it ends or fails. */
async function drain(socket: Socket): Promise<{ bytes: Buffer; error: unknown }> {
  const chunks: Buffer[] = []
  socket.on('data', chunk => chunks.push(chunk))
  const error = await new Promise(resolve =>
    socket.once('error', resolve).once('end', () => resolve(undefined)),
  )
  return { bytes: Buffer.concat(chunks), error }
}

const echo = (socket: Socket) => void socket.pipe(socket)
const RESET = expect.objectContaining({ code: 'ECONNRESET' })

describe('a NetworkProxy', () => {
  test('passes bytes both ways, in order and unchanged, and counts them', async () => {
    const { proxy } = await network(echo)
    const bytes = patternBytes(1, 0, 5_000_003)
    const client = through(proxy)
    client.end(bytes)
    expect((await buffer(client)).equals(bytes)).toBe(true)
    expect([proxy.bytesToServer, proxy.bytesToClient]).toEqual([5_000_003, 5_000_003])
  })

  test('passes a half-closed connection on as one', async () => {
    const { proxy } = await network(socket => {
      socket.resume().on('end', () => socket.end('after the end'))
    })
    const client = through(proxy)
    client.end('request')
    expect((await buffer(client)).toString()).toBe('after the end')
  })

  test('passes a reset on, behind the bytes that came before it', async () => {
    const { proxy } = await network(async socket => {
      socket.write('last words')
      await delay(50) // a reset drops what the proxy has not read
      socket.resetAndDestroy()
    })
    proxy.latencyMs = 400
    const { bytes, error } = await drain(through(proxy))
    expect(bytes.toString()).toBe('last words')
    expect(error).toEqual(RESET)
  })

  test('tells the server when a client resets its connection', async () => {
    const failure = Promise.withResolvers<unknown>()
    const { proxy } = await network(socket => socket.resume().on('error', failure.resolve))
    const client = through(proxy)
    client.write('hello', () => client.resetAndDestroy())
    expect(await failure.promise).toEqual(RESET)
  })

  test('resets a client when there is no server', async () => {
    const { proxy, server } = await network(echo)
    server.close()
    expect(await drain(through(proxy))).toEqual({ bytes: Buffer.alloc(0), error: RESET })
  })

  test('delays a round trip by its latency, and not each chunk after the other', async () => {
    const { proxy } = await network(echo)
    proxy.latencyMs = 200
    const client = through(proxy)
    const began = performance.now()
    const chunks = 40
    let came = 0
    client.on('data', bytes => {
      came += bytes.byteLength
    })
    for (let chunk = 0; chunk < chunks; chunk++) {
      client.write('0123456789')
      await delay(1) // so that they are chunks of their own
    }
    client.end()
    await once(client, 'end')
    const tookMs = performance.now() - began
    expect(came).toBe(chunks * 10)
    expect(tookMs).toBeGreaterThanOrEqual(199)
    expect(tookMs).toBeLessThan((chunks * 200) / 2) // a quarter of what one after the other would take
  })

  test('carries so many bytes a second, in pieces', async () => {
    const { proxy, sockets } = await network(() => undefined)
    proxy.bytesPerSecond = 1_000_000
    const client = through(proxy)
    await once(client, 'connect')
    await vi.waitFor(() => expect(sockets.size).toBe(1))
    const [server] = sockets
    const bytes = patternBytes(6, 0, 1_000_000)
    const began = performance.now()
    let pieces = 0
    client.on('data', () => pieces++)
    const came = buffer(client)
    server?.end(bytes)
    expect((await came).equals(bytes)).toBe(true)
    expect(performance.now() - began).toBeGreaterThan(750) // a fifth of a second may be made up for
    expect(pieces).toBeGreaterThan(5)
    proxy.heal()
    expect(proxy.bytesPerSecond).toBe(Number.POSITIVE_INFINITY)
  })

  test('keeps the order when the latency changes meanwhile', async () => {
    const { proxy } = await network(echo)
    const bytes = patternBytes(2, 0, 400_000)
    const client = through(proxy)
    const echoed = buffer(client)
    for (let at = 0; at < bytes.length; at += 20_000) {
      proxy.latencyMs = (at / 20_000) % 3 === 0 ? 60 : 0
      client.write(bytes.subarray(at, at + 20_000))
      await delay(1)
    }
    client.end()
    expect((await echoed).equals(bytes)).toBe(true)
  })

  test('lets a sender wait for a receiver that reads nothing', async () => {
    const size = 64 * 1024 * 1024
    const { proxy, sockets } = await network(() => undefined)
    const client = through(proxy)
    for (let sent = 0; sent < size; sent += 1024 * 1024) client.write(Buffer.alloc(1024 * 1024))
    client.end()
    const waiting: number[] = []
    await expect // that nothing has moved for a while
      .poll(() => waiting.push(client.writableLength) > 5 && new Set(waiting.slice(-5)).size === 1, {
        interval: 30,
      })
      .toBe(true)
    expect(waiting.at(-1)).toBeGreaterThan(size / 2)
    const [server] = sockets
    if (server === undefined) expect.unreachable('no connection')
    expect((await drain(server)).bytes).toHaveLength(size)
  })

  test.each([0, 1, 1000, 200_000, 300_000])('cuts after exactly %d bytes to the server, once', async at => {
    const received: ReturnType<typeof drain>[] = []
    const { proxy } = await network(socket => received.push(drain(socket)))
    const bytes = patternBytes(3, 0, 300_000)
    proxy.cutAfter(at, 'toServer')
    const cut = through(proxy)
    cut.write(bytes)
    expect((await drain(cut)).error).toEqual(RESET)
    expect(await received[0]).toEqual({ bytes: bytes.subarray(0, at), error: RESET })
    expect([proxy.bytesToServer, proxy.cuts]).toEqual([at, 1])

    through(proxy).end(bytes)
    await expect.poll(() => received.length).toBe(2)
    expect(await received[1]).toEqual({ bytes, error: undefined })
    expect(proxy.cuts).toBe(1)
  })

  test.each([0, 1, 1000, 200_000])('cuts after exactly %d bytes to the client, once', async at => {
    const bytes = patternBytes(4, 0, 300_000)
    const { proxy } = await network(socket => socket.end(bytes))
    proxy.cutAfter(at, 'toClient')
    expect(await drain(through(proxy))).toEqual({ bytes: bytes.subarray(0, at), error: RESET })
    expect([proxy.bytesToClient, proxy.cuts]).toEqual([at, 1])
    expect(await drain(through(proxy))).toEqual({ bytes, error: undefined })
  })

  test.each([0, 1, 1000, 200_000])('ends a direction in order after exactly %d bytes, once', async at => {
    const bytes = patternBytes(5, 0, 300_000)
    const received: ReturnType<typeof drain>[] = []
    const { proxy } = await network(socket => {
      received.push(drain(socket))
      socket.end(bytes)
    })
    proxy.endAfter(at, 'toClient')
    const client = through(proxy)
    expect(await drain(client)).toEqual({ bytes: bytes.subarray(0, at), error: undefined })
    client.end('what goes the other way')
    expect(await received[0]).toEqual({ bytes: Buffer.from('what goes the other way'), error: undefined })
    expect([proxy.bytesToClient, proxy.cuts]).toEqual([at, 1])

    proxy.endAfter(at, 'toServer')
    const other = through(proxy)
    other.end(bytes)
    expect(await drain(other)).toEqual({ bytes, error: undefined })
    expect(await received[1]).toEqual({ bytes: bytes.subarray(0, at), error: undefined })
    expect(proxy.cuts).toBe(2)
    await expect.poll(() => proxy.connections).toBe(0)
  })

  test('counts the bytes up to a cut over all connections', async () => {
    const { proxy } = await network(echo)
    const [first, second] = [through(proxy), through(proxy)]
    const failed = drain(second)
    first.write(Buffer.alloc(600))
    await once(first, 'data')
    proxy.cutAfter(1000, 'toServer')
    first.write(Buffer.alloc(600))
    await once(first, 'data')
    second.write(Buffer.alloc(600))
    expect((await failed).error).toEqual(RESET)
    first.write(Buffer.alloc(600))
    await once(first, 'data')
  })

  test('stalls, and delivers what it held when that is over', async () => {
    const { proxy } = await network(echo)
    const client = through(proxy)
    client.write('before')
    await once(client, 'data')
    proxy.stall()
    const [late, received] = [through(proxy), buffer(client)]
    await once(late, 'connect')
    client.end(' meanwhile')
    late.end('new')
    const answer = buffer(late)
    expect(await Promise.race([answer, received, delay(100)])).toBeUndefined()
    expect(proxy.bytesToServer).toBe('before'.length)
    proxy.resume()
    expect((await received).toString()).toBe(' meanwhile')
    expect((await answer).toString()).toBe('new')
  })

  test('refuses new connections and leaves those that are there, until it accepts again', async () => {
    const { proxy } = await network(echo)
    const client = through(proxy)
    client.write('before')
    await once(client, 'data')
    proxy.refuse()
    expect((await drain(through(proxy))).error).toMatchObject({ code: 'ECONNREFUSED' })
    client.write('still there')
    await once(client, 'data')
    proxy.accept()
    const next = through(proxy)
    next.end('again')
    expect((await buffer(next)).toString()).toBe('again')
  })

  test('accepts and refuses by what it was told last', async () => {
    const { proxy } = await network(echo)
    proxy.refuse()
    proxy.accept()
    proxy.refuse()
    await expect
      .poll(async () => (await drain(through(proxy))).error)
      .toEqual(expect.objectContaining({ code: 'ECONNREFUSED' }))
    proxy.accept()
    proxy.accept()
    await once(through(proxy), 'connect')
  })

  test('cuts all connections, and drops what a stall held back', async () => {
    const { proxy, sockets } = await network(echo)
    const clients = [through(proxy), through(proxy)]
    const ends = clients.map(drain)
    for (const client of clients) client.write('x')
    await expect.poll(() => proxy.bytesToClient).toBe(2)
    proxy.stall()
    for (const client of clients) client.write('held')
    await delay(20)
    proxy.cutAll()
    for (const end of ends) expect((await end).error).toEqual(RESET)
    proxy.resume()
    await expect.poll(() => [...sockets].every(socket => socket.destroyed)).toBe(true)
    expect(proxy.bytesToServer).toBe(2)
    expect(proxy.connections).toBe(0)
  })

  test('is healed of all at once', async () => {
    const { proxy } = await network(echo)
    proxy.latencyMs = 10_000
    proxy.stall()
    proxy.refuse()
    proxy.cutAfter(1, 'toServer')
    proxy.endAfter(1, 'toClient')
    proxy.heal()
    const client = through(proxy)
    client.end('well')
    expect((await buffer(client)).toString()).toBe('well')
  })

  test('ends its connections and its port when it is disposed of', async () => {
    const { proxy } = await network(echo)
    const client = through(proxy)
    const end = drain(client)
    client.write('x')
    await expect.poll(() => proxy.bytesToClient).toBe(1)
    await proxy[Symbol.asyncDispose]()
    expect((await end).error).toEqual(RESET)
    expect((await drain(through(proxy))).error).toMatchObject({ code: 'ECONNREFUSED' })
  })
})
