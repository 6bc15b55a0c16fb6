import { afterEach, describe, expect, it } from 'vitest'
import { NbdClient } from '../src/index.ts'
import {
  type FakeConnection,
  type FakeExport,
  type FakeRequest,
  FakeServer,
  patternDisk,
  u16,
  u32,
  u64,
} from './fake-server.ts'

const SIZE = 1 << 20
const disk = patternDisk(SIZE)
const structured: FakeExport = {
  size: SIZE,
  blockSize: [512, 4096, 1 << 20],
  contexts: { 'base:allocation': 3, 'x:y': 4 },
}
const simple: FakeExport = { size: SIZE, structured: false }

type Answer = (request: FakeRequest, connection: FakeConnection) => void

async function answered(exported: FakeExport, answer: Answer): Promise<NbdClient> {
  await using stack = new AsyncDisposableStack()
  const server = stack.use(await FakeServer.start({ export: exported, onRequest: answer }))
  const client = stack.use(await NbdClient.connect(server, { metaContexts: ['base:allocation', 'x:y'] }))
  const cleanup = stack.move()
  closers.push(() => cleanup.disposeAsync())
  return client
}

const closers: (() => Promise<void>)[] = []
afterEach(async () => {
  for (const close of closers.splice(0)) await close()
})

const oneByte = Buffer.of(1)
const all = (request: FakeRequest) => disk.subarray(request.offset, request.offset + request.length)

describe('a reply to a read', () => {
  it.each<[string, Answer, FakeExport?]>([
    [
      'of a wrong magic',
      (r, to) => to.send(Buffer.concat([u32(0x668e33ee), u16(1), u16(0), r.cookie, u32(0)])),
    ],
    ['of a request that was not sent', (r, to) => to.none({ ...r, cookie: Buffer.alloc(8, 9) })],
    ['of an old cookie', (r, to) => to.none({ ...r, cookie: u64(0) })],
    [
      'of a cookie that is right in its lower half',
      (r, to) => to.none({ ...r, cookie: Buffer.concat([u32(1), r.cookie.subarray(4)]) }),
    ],
    ['with data before the range', (r, to) => to.data(r, r.offset - 1, oneByte)],
    ['with data behind the range', (r, to) => to.data(r, r.offset + r.length, oneByte)],
    ['with data over the end', (r, to) => to.data(r, r.offset + r.length - 1, Buffer.alloc(2))],
    ['with data at 2^64 - 1', (r, to) => to.chunk(r, 1, false, Buffer.alloc(8, 0xff), oneByte)],
    [
      'that announces 4 GiB',
      (r, to) =>
        to.send(Buffer.concat([u32(0x668e33ef), u16(1), u16(1), r.cookie, u32(0xffffffff), u64(r.offset)])),
    ],
    ['with a chunk of no data', (r, to) => to.data(r, r.offset, Buffer.alloc(0))],
    ['with a hole of no length', (r, to) => to.hole(r, r.offset, 0)],
    ['with a hole over the end', (r, to) => to.hole(r, r.offset, 0xffffffff)],
    ['with a hole of a wrong payload', (r, to) => to.chunk(r, 2, false, u64(r.offset))],
    ['with the same data twice', (r, to) => [1, 2].map(() => to.data(r, r.offset, all(r)))],
    [
      'with data and a hole over each other',
      (r, to) => {
        to.hole(r, r.offset + 100, 100)
        to.data(r, r.offset + 199, oneByte)
      },
    ],
    ['with bytes missing at the end', (r, to) => to.data(r, r.offset, all(r).subarray(1), true)],
    ['with bytes missing at the beginning', (r, to) => to.data(r, r.offset + 1, all(r).subarray(1), true)],
    ['with nothing in it', (r, to) => to.none(r)],
    [
      'in 1025 pieces with gaps',
      (r, to) => {
        for (let index = 0; index < 1025; index++) to.data(r, r.offset + 2 * index + 1, oneByte)
      },
    ],
    ['that goes on after an empty chunk', (r, to) => to.chunk(r, 0, false, Buffer.alloc(0))],
    ['with an empty chunk that is not', (r, to) => to.chunk(r, 0, true, oneByte)],
    ['with a chunk of an unknown type', (r, to) => to.chunk(r, 77, false, Buffer.alloc(4))],
    ['with a block status', (r, to) => to.status(r, 3, [512, 0])],
    ['that is simple', (r, to) => to.simple(r, 0, all(r))],
    ['with an error of number 0', (r, to) => to.error(r, 0)],
    ['with an error too short', (r, to) => to.chunk(r, 0x8001, true, Buffer.alloc(5))],
    ['with an error too long', (r, to) => to.error(r, 5, 'x'.repeat(5000))],
    [
      'with an error whose text is longer than itself',
      (r, to) => to.chunk(r, 0x8001, true, Buffer.concat([u32(5), u16(9), u64(0)])),
    ],
    [
      'with an error whose text is shorter than the rest',
      (r, to) => to.chunk(r, 0x8001, true, Buffer.concat([u32(5), u16(7), u64(0)])),
    ],
    [
      'with an error at a place outside',
      (r, to) => to.chunk(r, 0x8002, true, Buffer.concat([u32(5), u16(0), u64(r.offset + r.length)])),
    ],
    ['with an error at no place', (r, to) => to.chunk(r, 0x8002, true, Buffer.concat([u32(5), u16(0)]))],
    [
      'with errors without end',
      (r, to) => {
        for (let index = 0; index < 17; index++) to.error(r, 5, '', false)
      },
    ],
    [
      'that is structured although that was not agreed to',
      (r, to) => to.data(r, r.offset, all(r), true),
      simple,
    ],
    ['of a request that was not sent, simple', (r, to) => to.simple({ ...r, cookie: u64(99) }), simple],
  ])('%s is NBD_PROTOCOL', async (_what, answer, exported = structured) => {
    const client = await answered(exported, answer)
    const into = Buffer.alloc(4096)
    await expect(client.read(8192, into)).rejects.toMatchObject({ name: 'NbdError', code: 'NBD_PROTOCOL' })
  })

  it('that is wrong ends the client: other calls fail too, those to come as well', async () => {
    const client = await answered(structured, (request, to) => {
      if (request.offset === 8192) to.send(Buffer.alloc(20))
    })
    const calls = [
      client.read(0, Buffer.alloc(512)),
      client.read(8192, Buffer.alloc(512)),
      client.mapExtents(),
    ]
    for (const call of calls) await expect(call).rejects.toMatchObject({ code: 'NBD_PROTOCOL' })
    await expect(client.read(0, Buffer.alloc(512))).rejects.toMatchObject({ code: 'NBD_PROTOCOL' })
  })

  it('that was not asked for is NBD_PROTOCOL for the next call', async () => {
    const client = await answered(structured, (request, to) => {
      to.data(request, request.offset, all(request), true)
      to.data(request, request.offset, all(request), true)
    })
    await client.read(0, Buffer.alloc(512)).catch(() => undefined)
    await expect(client.read(0, Buffer.alloc(512))).rejects.toMatchObject({ code: 'NBD_PROTOCOL' })
  })
})

describe('a reply to a block status request', () => {
  const other: Answer = (r, to) => to.status(r, 4, [r.length, 0])
  it.each<[string, Answer]>([
    ['of an unknown context', (r, to) => to.status(r, 5, [512, 0])],
    ['of one context twice', (r, to) => [1, 2].map(() => to.status(r, 3, [512, 0]))],
    ['without one of the contexts', (r, to) => to.status(r, 3, [512, 0], true)],
    ['without extents', (r, to) => to.status(r, 3, [])],
    ['with half an extent', (r, to) => to.status(r, 3, [512, 0, 512])],
    ['with an extent of no length', (r, to) => to.status(r, 3, [0, 0])],
    ['with an extent of half a block', (r, to) => to.status(r, 3, [256, 0])],
    ['with extents behind the range', (r, to) => to.status(r, 3, [r.length, 0, 512, 0])],
    [
      'with more extents than there can be',
      (r, to) => to.chunk(r, 5, false, Buffer.alloc(4 + 8 * (2 ** 20 + 1))),
    ],
    [
      'that announces 4 GiB',
      (r, to) => to.send(Buffer.concat([u32(0x668e33ef), u16(1), u16(5), r.cookie, u32(0xfffffffc)])),
    ],
    ['with data', (r, to) => to.data(r, r.offset, oneByte)],
    ['that is simple', (r, to) => to.simple(r)],
    ['with nothing in it', (r, to) => to.none(r)],
    [
      'that goes on for ever after the last context',
      (r, to) => {
        other(r, to)
        other(r, to)
      },
    ],
  ])('%s is NBD_PROTOCOL', async (_what, answer) => {
    const client = await answered(structured, answer)
    await expect(client.blockStatus(0, 65536)).rejects.toMatchObject({
      name: 'NbdError',
      code: 'NBD_PROTOCOL',
    })
  })
})

it('a map in which each reply tells of one byte is NBD_PROTOCOL, and the end of the client', async () => {
  const huge: FakeExport = { size: Number.MAX_SAFE_INTEGER, contexts: { 'base:allocation': 3, 'x:y': 4 } }
  const client = await answered(huge, (r, to) => {
    to.status(r, 3, [1, 0])
    to.status(r, 4, [r.length, 0], true)
  })
  await expect(client.mapExtents()).rejects.toMatchObject({ name: 'NbdError', code: 'NBD_PROTOCOL' })
  await expect(client.read(0, Buffer.alloc(512))).rejects.toMatchObject({ code: 'NBD_PROTOCOL' })
}, 60_000)

describe('a reply to a write', () => {
  it.each<[string, Answer]>([
    ['with data', (r, to) => to.data(r, r.offset, oneByte, true)],
    ['with a hole', (r, to) => to.hole(r, r.offset, 1, true)],
    ['with a block status', (r, to) => to.status(r, 3, [512, 0], true)],
  ])('%s is NBD_PROTOCOL', async (_what, answer) => {
    const client = await answered(structured, answer)
    await expect(client.write(0, Buffer.alloc(512))).rejects.toMatchObject({ code: 'NBD_PROTOCOL' })
  })

  it('may be simple or structured', async () => {
    const client = await answered(structured, (r, to) => (r.offset === 0 ? to.simple(r) : to.none(r)))
    await client.write(0, Buffer.alloc(512))
    await client.write(512, Buffer.alloc(512))
  })
})
