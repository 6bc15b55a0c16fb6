import { EventEmitter, once } from 'node:events'
import { type AddressInfo, connect as connectSocket, createServer, type Socket } from 'node:net'
import type { SFTPWrapper } from 'ssh2'
import { afterEach, expect, onTestFinished, test, vi } from 'vitest'
import { SftpConnection } from '../src/connection.ts'

const TIMEOUT_MS = 400
/** A keepalive goes out every quarter of the timeout; its answer has about this size. */
const KEEPALIVE_BYTES = 60

afterEach(() => vi.useRealTimers())

test('an answer of which a part comes now and then is waited for, and then none that stays away', async () => {
  const { call, socket, settled } = beginCall()
  for (let part = 0; part < 10; part++) await pass(TIMEOUT_MS / 2, () => (socket.bytesRead += 5000))
  expect(await settled()).toBe(false)
  await pass(1.25 * TIMEOUT_MS)
  await expect(call).rejects.toMatchObject({ code: 'STORAGE_UNREACHABLE', retryable: true })
})

test('a server of which only keepalives are answered is silent, but not while it writes a file to its disk', async () => {
  for (const flush of [false, true]) {
    const { call, socket, settled } = beginCall(flush)
    const keepAlive = () => pass(TIMEOUT_MS / 4, () => (socket.bytesRead += KEEPALIVE_BYTES))
    for (let answers = 0; answers < 3; answers++) await keepAlive()
    expect(await settled(), `flush ${flush}`).toBe(false)
    for (let answers = 0; answers < 20; answers++) await keepAlive()
    expect(await settled(), `flush ${flush}`).toBe(!flush)
    if (flush) await pass(1.25 * TIMEOUT_MS)
    await expect(call, `flush ${flush}`).rejects.toMatchObject({ code: 'STORAGE_UNREACHABLE' })
  }
})

test('keepalives before a request do not count for it', async () => {
  const { connection, socket } = connect()
  socket.bytesRead += 1_000_000
  const call = connection.call(() => undefined)
  call.catch(() => undefined)
  await pass(1.25 * TIMEOUT_MS)
  await expect(call).rejects.toMatchObject({ code: 'STORAGE_UNREACHABLE' })
})

test('a process that was held up itself reads what has come before it calls the server silent', async () => {
  const { connection } = connect(false)
  const call = connection.call<string>((_, done) => setImmediate(done, undefined, 'there'))
  const end = performance.now() + 1.2 * TIMEOUT_MS
  while (performance.now() < end);
  await expect(call).resolves.toBe('there')
})

test('a connection that broke is reset, so that nothing of it arrives later', async () => {
  const server = createServer({ pauseOnConnect: true }).listen(0, '127.0.0.1')
  onTestFinished(() => void server.close())
  await once(server, 'listening')
  const accepted = once(server, 'connection')
  const socket = connectSocket((server.address() as AddressInfo).port, '127.0.0.1')
  const [peer] = (await accepted) as [Socket]
  const connection = begin(socket)
  socket.write('a request')
  connection.onError(new Error('boom'))
  const [reset] = await once(peer.resume(), 'error')
  expect(reset).toMatchObject({ code: 'ECONNRESET' })
})

test.each([
  ['limits of OpenSSH', 262_144, 261_120, 261_120, Number.POSITIVE_INFINITY, 261_120],
  ['larger limits than ssh2 takes', 2 ** 30, 2 ** 20, 2 ** 20, 100, 261_120],
  ['small limits', 262_144, 8000, 512, 100, 512],
  ['only a limit of whole packets', 4096, 260_096, 260_096, 100, 4096 - 281],
  ['no limits, by OpenSSH', 34_000, 260_096, 260_096, undefined, 32_768],
  ['no limits, by others', 34_000, 31_952, 31_952, undefined, 31_952],
  ['limits, to an ssh2 that keeps them elsewhere', undefined, undefined, undefined, 100, 16_384],
])('packets to a server that tells %s', (_, packet, read, write, maxOpenHandles, size) => {
  const fields = { _maxOutPktLen: packet, _maxReadLen: read, _maxWriteLen: write, maxOpenHandles }
  expect(connect(true, fields).connection.packetSize).toBe(size)
})

function beginCall(flush = false) {
  const { connection, socket } = connect()
  let isSettled = false
  const call = connection.call(() => undefined, { flush })
  call.catch(() => (isSettled = true))
  const settled = async () => {
    await vi.advanceTimersByTimeAsync(0)
    return isSettled
  }
  return { call, socket, settled }
}

function connect(fakeTimers = true, fields: object = {}) {
  if (fakeTimers) vi.useFakeTimers()
  const socket = Object.assign(new EventEmitter(), {
    bytesRead: 0,
    destroyed: false,
    resetAndDestroy: () => undefined,
  })
  return { connection: begin(socket as unknown as Socket, fields), socket }
}

function begin(socket: Socket, fields: object = {}): SftpConnection {
  return new SftpConnection({
    socket,
    sftp: Object.assign(new EventEmitter(), fields) as SFTPWrapper,
    fingerprint: 'SHA256:x',
    address: 'sftp://host:22',
    timeoutMs: TIMEOUT_MS,
    end: () => undefined,
  })
}

async function pass(ms: number, then?: () => void): Promise<void> {
  await vi.advanceTimersByTimeAsync(ms)
  then?.()
}
