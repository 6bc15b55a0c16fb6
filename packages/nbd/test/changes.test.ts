import { describe, expect, it } from 'vitest'
import { NbdClient } from '../src/index.ts'
import {
  type FakeExport,
  FakeServer,
  patternDisk,
  READ_ONLY,
  SEND_FLUSH,
  SEND_FUA,
  SEND_TRIM,
  SEND_WRITE_ZEROES,
  serveDisk,
} from './fake-server.ts'

const ALL = SEND_FLUSH | SEND_FUA | SEND_TRIM | SEND_WRITE_ZEROES
const SIZE = 2 ** 33
const FUA = 1
const NO_HOLE = 2

/** A server that agrees to everything, a client of it, and what the server was asked. */
async function open(exported: Partial<FakeExport>, maxRequestBytes = 65536) {
  await using stack = new AsyncDisposableStack()
  const server = stack.use(
    await FakeServer.start({
      export: { size: SIZE, flags: ALL, blockSize: [512, 4096, 2 ** 25], ...exported },
      onRequest: serveDisk(Buffer.alloc(0)),
    }),
  )
  const client = stack.use(await NbdClient.connect(server, { maxRequestBytes }))
  const cleanup = stack.move()
  const asked = () =>
    server.requests.map(({ command, flags, offset, length }) => [command, flags, offset, length])
  return { server, client, asked, [Symbol.asyncDispose]: () => cleanup.disposeAsync() }
}

describe('writing', () => {
  it('splits the data and sends each byte of it to its place', async () => {
    await using lab = await open({})
    const data = patternDisk(300_032)
    await lab.client.write(2 ** 32 + 512, data)
    const disk = Buffer.alloc(data.length)
    for (const { offset, data } of lab.server.requests) data.copy(disk, offset - 2 ** 32 - 512)
    expect(disk.equals(data)).toBe(true)
    expect(lab.server.requests.reduce((sum, { length }) => sum + length, 0)).toBe(data.length)
    expect(Math.max(...lab.server.requests.map(({ length }) => length))).toBe(65536)
  })

  it('writes through where it is asked to, with a flush where the server knows no better', async () => {
    await using lab = await open({})
    await lab.client.write(0, Buffer.alloc(512), { fua: true })
    await lab.client.writeZeroes(0, 512, { fua: true })
    await lab.client.trim(0, 512, { fua: true })
    expect(lab.asked()).toEqual([
      ['write', FUA, 0, 512],
      ['writeZeroes', FUA, 0, 512],
      ['trim', FUA, 0, 512],
    ])
    await using plain = await open({ flags: SEND_FLUSH })
    await plain.client.write(0, Buffer.alloc(512), { fua: true })
    expect(plain.asked()).toEqual([
      ['write', 0, 0, 512],
      ['flush', 0, 0, 0],
    ])
  })

  it('zeroes in pieces that every server takes, with or without holes', async () => {
    await using lab = await open({})
    await lab.client.writeZeroes(512, 2 ** 25 + 512)
    await lab.client.writeZeroes(0, 512, { allowTrim: false })
    expect(lab.asked()).toEqual([
      ['writeZeroes', 0, 512, 2 ** 25],
      ['writeZeroes', 0, 512 + 2 ** 25, 512],
      ['writeZeroes', NO_HOLE, 0, 512],
    ])
  })

  it('writes zeroes as data where the server knows no better', async () => {
    await using lab = await open({ flags: SEND_FLUSH })
    await lab.client.writeZeroes(512, 200_192)
    expect(lab.server.requests.every(({ data }) => data.every(byte => byte === 0))).toBe(true)
    expect(lab.asked()).toEqual([
      ['write', 0, 512, 65536],
      ['write', 0, 66_048, 65536],
      ['write', 0, 131_584, 65536],
      ['write', 0, 197_120, 3584],
    ])
  })

  it('trims a whole disk in pieces', async () => {
    await using lab = await open({})
    await lab.client.trim(0, SIZE)
    expect(lab.server.requests.length).toBe(2 ** 8)
    expect(lab.server.requests.reduce((sum, { length }) => sum + length, 0)).toBe(SIZE)
  })

  it('asks nothing of a server that cannot trim or flush, and nothing for no bytes', async () => {
    await using lab = await open({ flags: SEND_WRITE_ZEROES })
    await lab.client.trim(0, 512)
    await lab.client.flush()
    await lab.client.write(0, Buffer.alloc(0))
    await lab.client.writeZeroes(SIZE, 0)
    expect(lab.asked()).toEqual([])
  })

  it('keeps to the sizes of the server', async () => {
    await using lab = await open({ blockSize: [4096, 4096, 12_288] })
    await lab.client.write(4096, Buffer.alloc(20_480))
    await lab.client.writeZeroes(0, 16_384)
    expect(lab.asked()).toEqual([
      ['write', 0, 4096, 12_288],
      ['write', 0, 16_384, 8192],
      ['writeZeroes', 0, 0, 12_288],
      ['writeZeroes', 0, 12_288, 4096],
    ])
  })

  it('may end with the export where that is no whole block', async () => {
    await using lab = await open({ size: 1000 })
    await lab.client.write(512, Buffer.alloc(488))
    expect(lab.asked()).toEqual([['write', 0, 512, 488]])
  })

  it.each([
    ['behind the end', { size: 1024 }, 512, 1024],
    ['within a block', {}, 100, 512],
    ['of half a block', {}, 512, 100],
    ['to a read-only export', { flags: READ_ONLY | ALL }, 0, 512],
  ] as const)('refuses what is %s', async (_what, exported, offset, length) => {
    await using lab = await open(exported)
    const refusal = { code: 'NBD_ARGUMENT' }
    await expect(lab.client.write(offset, Buffer.alloc(length))).rejects.toMatchObject(refusal)
    await expect(lab.client.writeZeroes(offset, length)).rejects.toMatchObject(refusal)
    await expect(lab.client.trim(offset, length)).rejects.toMatchObject(refusal)
    expect(lab.asked()).toEqual([])
  })

  it('fails with the error of the server and sends no more of the data', async () => {
    await using server = await FakeServer.start({
      export: { size: SIZE, flags: ALL },
      onRequest: (request, connection) => connection.simple(request, request.offset === 0 ? 28 : 0),
    })
    await using client = await NbdClient.connect(server, { maxRequestBytes: 4096 })
    const failure = client.write(0, Buffer.alloc(4096 * 1000))
    await expect(failure).rejects.toMatchObject({ code: 'NBD_SERVER', errno: 'ENOSPC' })
    expect(server.requests.length).toBeLessThan(200)
  })
})
