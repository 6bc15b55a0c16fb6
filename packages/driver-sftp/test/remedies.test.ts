import { once } from 'node:events'
import { type AddressInfo, createServer } from 'node:net'
import { finished } from 'node:stream/promises'
import { SftpDriver } from '@varve/driver-sftp'
import ssh2 from 'ssh2'
import { expect, onTestFinished, test } from 'vitest'
import { FakeServer, HOST_KEY } from './fake-server.ts'

const SIZE = 8_000_000 // more than is asked for at once

test('a server of other algorithms is told with those to allow', async () => {
  const old = new ssh2.Server({ hostKeys: [HOST_KEY], algorithms: { cipher: ['3des-cbc'] } }, client =>
    client.on('error', () => undefined),
  )
  const server = createServer(socket => old.injectSocket(socket)).listen(0, '127.0.0.1')
  onTestFinished(() => void server.close())
  await once(server, 'listening')
  const { port } = server.address() as AddressInfo
  await using driver = new SftpDriver({ host: '127.0.0.1', port, username: 'user', password: 'pa55word' })
  await expect(driver.stat('a')).rejects.toMatchObject({
    code: 'STORAGE_UNREACHABLE',
    message: expect.stringMatching(/no common ground: .*cipher.* Allow current algorithms on the server/),
  })
})

test('a storage whose folder is gone is told with what to do', async () => {
  const { server, driver } = await FakeServer.begin({ pathPrefix: '/store' })
  server.folders.add('/store')
  expect(await driver.stat('a')).toBeUndefined()
  server.folders.delete('/store')
  await expect(driver.stat('a')).rejects.toMatchObject({
    code: 'STORAGE_NOT_FOUND',
    message: expect.stringContaining('Mount what belongs there, or make it again.'),
  })
})

test.each([
  ['becomes shorter', false, 'it has become shorter than at the beginning. Read it again.'],
  ['is another one after a cut', true, 'it is another one than at the beginning. Read it again.'],
])('an object that %s while it is read is told so', async (_, cut, message) => {
  const { server, driver } = await FakeServer.begin()
  server.files.set('/a', Buffer.alloc(SIZE))
  const stream = await driver.get('a')
  await once(stream, 'readable')
  server.files.set('/a', Buffer.alloc(1000))
  if (cut) server.cut()
  stream.resume()
  await expect(finished(stream)).rejects.toMatchObject({
    code: 'STORAGE_FAILED',
    message: expect.stringContaining(message),
  })
})
