import { mkdtemp, rm } from 'node:fs/promises'
import { createServer, type Socket } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { describe, expect, it } from 'vitest'
import { NbdClient, type NbdConnectOptions } from '../src/index.ts'
import { FakeServer, MULTI_CONN, patternDisk, READ_ONLY, serveDisk, u16, u32, u64 } from './fake-server.ts'

const HELLO = Buffer.concat([Buffer.from('NBDMAGICIHAVEOPT'), u16(3)])
const disk = patternDisk(100_000)

function optionReply(option: number, type: number, ...parts: Buffer[]): Buffer {
  const payload = Buffer.concat(parts)
  return Buffer.concat([
    Buffer.from('0003e889045565a9', 'hex'),
    u32(option),
    u32(type),
    u32(payload.length),
    payload,
  ])
}

const ACK_STRUCTURED = optionReply(8, 1)
const exportInfo = (size: number | bigint, flags = 1) => optionReply(7, 3, u16(0), u64(size), u16(flags))

const contexts = { metaContexts: ['base:allocation', 'x:y'] }
const context = (id: number, name: string) => optionReply(10, 4, u32(id), Buffer.from(name))
const sizes = (least: number, best: number, most: number) => [
  HELLO,
  ACK_STRUCTURED,
  exportInfo(65536),
  optionReply(7, 3, u16(3), u32(least), u32(best), u32(most)),
  optionReply(7, 1),
]

/** Connects to a server that says `bytes` whatever it is asked, and then calls `after`. */
async function connectTo(
  bytes: readonly Buffer[],
  options: NbdConnectOptions = {},
  after: (socket: Socket) => void = () => undefined,
): Promise<NbdClient> {
  const folder = await mkdtemp(join(tmpdir(), 'varve-nbd-'))
  const sockets: Socket[] = []
  const server = createServer(socket => {
    sockets.push(socket)
    socket.on('error', () => socket.destroy())
    socket.resume()
    socket.write(Buffer.concat(bytes))
    after(socket)
  })
  await new Promise<void>(resolve => server.listen(join(folder, 's'), resolve))
  try {
    const client = await NbdClient.connect({ socketPath: join(folder, 's') }, options)
    await client.close()
    return client
  } finally {
    for (const socket of sockets) socket.destroy()
    await new Promise(resolve => server.close(resolve))
    await rm(folder, { recursive: true })
  }
}

describe('the negotiation', () => {
  it('tells what the server agreed to', async () => {
    await using server = await FakeServer.start({
      export: {
        size: 100_000,
        flags: READ_ONLY | MULTI_CONN,
        blockSize: [512, 4096, 65536],
        contexts: { 'base:allocation': 5, 'qemu:dirty-bitmap:b': 9 },
      },
    })
    await using client = await NbdClient.connect(server, {
      metaContexts: ['base:allocation', 'qemu:dirty-bitmap:missing', 'qemu:dirty-bitmap:b'],
    })
    expect(client).toMatchObject({
      size: 100_000,
      readOnly: true,
      multiConn: true,
      blockSize: { minimum: 512, preferred: 4096, maximum: 65536 },
      metaContexts: ['base:allocation', 'qemu:dirty-bitmap:b'],
    })
  })

  it('works in pieces of one byte', async () => {
    await using server = await FakeServer.start({
      export: { size: disk.length, contexts: { 'base:allocation': 1 } },
      onRequest: serveDisk(disk),
      send: (bytes, _isData, socket) => {
        for (const byte of bytes) socket.write(Buffer.of(byte))
      },
    })
    await using client = await NbdClient.connect(server, { metaContexts: ['base:allocation'] })
    const into = Buffer.alloc(1000)
    await client.read(7, into)
    expect(into.equals(disk.subarray(7, 1007))).toBe(true)
  })

  it('does without structured replies, and then without contexts', async () => {
    await using server = await FakeServer.start({
      export: { size: disk.length, structured: false, contexts: { 'base:allocation': 1 } },
      onRequest: serveDisk(disk, false),
    })
    await using client = await NbdClient.connect(server, { metaContexts: ['base:allocation'] })
    expect(client.metaContexts).toEqual([])
    expect((await client.mapExtents()).size).toBe(0)
    await expect(client.blockStatus(0, 512)).rejects.toMatchObject({ code: 'NBD_ARGUMENT' })
    const into = Buffer.alloc(disk.length)
    await client.read(0, into)
    expect(into.equals(disk)).toBe(true)
  })

  it('takes the largest export that a number can count, and an empty one', async () => {
    const most = await connectTo([HELLO, ACK_STRUCTURED, exportInfo(2n ** 53n - 1n), optionReply(7, 1)])
    expect(most.size).toBe(Number.MAX_SAFE_INTEGER)
    const none = await connectTo([HELLO, ACK_STRUCTURED, exportInfo(0), optionReply(7, 1)])
    expect(none.size).toBe(0)
  })

  it('assumes the sizes of the protocol where the server names none, and skips information it did not ask for', async () => {
    const name = optionReply(7, 3, u16(1), Buffer.from('a name'))
    const client = await connectTo([HELLO, ACK_STRUCTURED, name, exportInfo(512), optionReply(7, 1)])
    expect(client.blockSize).toEqual({ minimum: 1, preferred: 4096, maximum: 32 * 1024 * 1024 })
  })

  it('takes block sizes at their limits', async () => {
    for (const [least, best, most] of [
      [65536, 65536, 65536],
      [1, 512, 1],
      [512, 2 ** 31, 0xffffffff],
    ] as const) {
      const client = await connectTo(sizes(least, best, most))
      expect(client.blockSize).toEqual({ minimum: least, preferred: best, maximum: most })
    }
  })

  it('has no contexts when the server refuses them halfway', async () => {
    const refusal = optionReply(10, 0x80000003)
    const bytes = [HELLO, ACK_STRUCTURED, context(1, 'x:y'), refusal, exportInfo(512), optionReply(7, 1)]
    expect((await connectTo(bytes, contexts)).metaContexts).toEqual([])
  })

  it.each([
    ['an export that is too large', [HELLO, ACK_STRUCTURED, exportInfo(2n ** 53n), optionReply(7, 1)]],
    ['the old negotiation', [Buffer.from('NBDMAGIC'), Buffer.from('0000420281861253', 'hex')]],
    ['a negotiation that is not fixed', [Buffer.from('NBDMAGICIHAVEOPT'), u16(2)]],
    ['an unknown export', [HELLO, ACK_STRUCTURED, optionReply(7, 0x80000006, Buffer.from('no such thing'))]],
    ['an export that wants TLS', [HELLO, ACK_STRUCTURED, optionReply(7, 0x80000005)]],
  ])('refuses %s as NBD_CONNECT', async (_what, bytes) => {
    await expect(connectTo(bytes)).rejects.toMatchObject({ name: 'NbdError', code: 'NBD_CONNECT' })
  })

  it("puts the server's reason in the message, without control characters", async () => {
    const refusal = optionReply(7, 0x80000006, Buffer.from('no\u001b[31m\nsuch\u202ething'))
    const error = await connectTo([HELLO, ACK_STRUCTURED, refusal]).catch(error => error)
    expect(error.message).toContain('there is no such export (no [31m such thing)')
  })

  it.each<[string, readonly Buffer[], NbdConnectOptions?]>([
    ['another greeting', [Buffer.from('SSH-2.0-OpenSSH_9.2p1 Debian\r\n')]],
    ['a wrong magic of an option reply', [HELLO, Buffer.of(9), ACK_STRUCTURED.subarray(1)]],
    ['a reply to another option', [HELLO, optionReply(9, 1)]],
    ['an announced reply of 4 GiB', [HELLO, optionReply(8, 3).subarray(0, 16), u32(0xffffffff)]],
    ['an ACK with a payload', [HELLO, optionReply(8, 1, u32(1))]],
    ['replies without end', [HELLO, ACK_STRUCTURED, ...Array(65).fill(optionReply(7, 3, u16(1)))]],
    ['bytes without end', [HELLO, ACK_STRUCTURED, exportInfo(512), Buffer.alloc(300 * 1024)]],
    ['no size of the export', [HELLO, ACK_STRUCTURED, optionReply(7, 1)]],
    ['a wrong length of the export information', [HELLO, ACK_STRUCTURED, optionReply(7, 3, u16(0), u32(1))]],
    [
      'a wrong length of the block size information',
      [HELLO, ACK_STRUCTURED, optionReply(7, 3, u16(3), u32(1))],
    ],
    ['information without a kind', [HELLO, ACK_STRUCTURED, optionReply(7, 3)]],
    ['an export without flags', [HELLO, ACK_STRUCTURED, exportInfo(512, 0), optionReply(7, 1)]],
    ['a minimum block size of no power of two', sizes(3, 4096, 0xffffffff)],
    ['a minimum block size above 64 KiB', sizes(131072, 131072, 0xffffffff)],
    ['a minimum block size of zero', sizes(0, 4096, 0xffffffff)],
    ['a preferred block size of no power of two', sizes(1, 5000, 0xffffffff)],
    ['a preferred block size below the minimum', sizes(4096, 512, 0xffffffff)],
    ['a maximum block size below the minimum', sizes(4096, 4096, 512)],
    ['a maximum block size of no multiple of the minimum', sizes(512, 4096, 65537)],
    ['a context that was not asked for', [HELLO, ACK_STRUCTURED, context(1, 'base:other')], contexts],
    [
      'a context twice',
      [HELLO, ACK_STRUCTURED, context(1, 'x:y'), context(2, 'x:y'), optionReply(10, 1)],
      contexts,
    ],
    [
      'an id twice',
      [HELLO, ACK_STRUCTURED, context(1, 'x:y'), context(1, 'base:allocation'), optionReply(10, 1)],
      contexts,
    ],
    ['a context without an id', [HELLO, ACK_STRUCTURED, optionReply(10, 4, u16(1))], contexts],
    [
      'a reply before a request',
      [HELLO, ACK_STRUCTURED, exportInfo(512), optionReply(7, 1), Buffer.alloc(64)],
    ],
  ])('calls %s NBD_PROTOCOL', async (_what, bytes, options) => {
    await expect(connectTo(bytes, options)).rejects.toMatchObject({ name: 'NbdError', code: 'NBD_PROTOCOL' })
  })

  it('fails with NBD_CONNECT wherever in it the server hangs up', async () => {
    const bytes = Buffer.concat([HELLO, ACK_STRUCTURED, exportInfo(512), optionReply(7, 1)])
    for (let length = 0; length < bytes.length; length++) {
      const failure = connectTo([bytes.subarray(0, length)], {}, socket => socket.end())
      await expect(failure, `after ${length} bytes`).rejects.toMatchObject({ code: 'NBD_CONNECT' })
    }
  })

  it('fails with NBD_TIMEOUT when the server is silent', async () => {
    await expect(connectTo([HELLO], { timeoutMs: 50 })).rejects.toMatchObject({ code: 'NBD_TIMEOUT' })
  })

  it('is given up by the signal, before and while it runs', async () => {
    const reason = new Error('enough')
    const before = connectTo([], { signal: AbortSignal.abort(reason) })
    await expect(before).rejects.toMatchObject({ code: 'NBD_ABORTED', cause: reason })
    const controller = new AbortController()
    const running = connectTo([HELLO], { signal: controller.signal }, () => controller.abort(reason))
    await expect(running).rejects.toMatchObject({ code: 'NBD_ABORTED', cause: reason })
  })

  it('fails with NBD_CONNECT where nothing listens', async () => {
    const nowhere = NbdClient.connect({ socketPath: join(tmpdir(), 'varve-nbd-nothing-here') })
    await expect(nowhere).rejects.toMatchObject({ code: 'NBD_CONNECT' })
  })

  it.each<[string, Parameters<typeof NbdClient.connect>]>([
    ['a path too long for a socket', [{ socketPath: `/${'x'.repeat(107)}` }]],
    ['an empty path', [{ socketPath: '' }]],
    ['a port out of range', [{ host: 'localhost', port: 65536 }]],
    ['a name too long for the protocol', [{ socketPath: '/s' }, { exportName: 'x'.repeat(4097) }]],
    ['no timeout', [{ socketPath: '/s' }, { timeoutMs: 0 }]],
    ['no connections', [{ socketPath: '/s' }, { connections: 0 }]],
    ['requests above what every server takes', [{ socketPath: '/s' }, { maxRequestBytes: 2 ** 26 }]],
  ])('refuses %s as NBD_ARGUMENT', async (_what, args) => {
    await expect(NbdClient.connect(...args)).rejects.toMatchObject({ code: 'NBD_ARGUMENT' })
  })
})
