import type { Socket } from 'node:net'
import { Readable } from 'node:stream'
import { buffer } from 'node:stream/consumers'
import { bytesBody } from '@varve/core'
import type { FtpDriver } from '@varve/driver-ftp'
import { afterEach, expect, onTestFinished, test, vi } from 'vitest'
import { FakeServer } from './fake-server.ts'

const aborted = { code: 'ABORTED' }

afterEach(() => {
  vi.useRealTimers()
})

/** An upload of a stream that has no end before it is told to. */
function endlessUpload(driver: FtpDriver, key: string) {
  const source = new Readable({ read: () => undefined })
  const stored = driver.put(key, source)
  stored.catch(() => undefined) // the test that it is of may have failed already
  return { stored, end: () => source.push(null) }
}

test('a server that allows more connections again is asked for them after a minute', async () => {
  vi.useFakeTimers({ toFake: ['setTimeout', 'clearTimeout'] })
  const { server, driver } = await FakeServer.begin({ connections: 3 })
  const users = new Set<Socket>()
  let allowed = 1
  server.twists.USER = (_, { control }) => {
    if (users.size >= allowed) return '421 Too many connections.'
    users.add(control.once('close', () => users.delete(control)))
    return undefined
  }
  const lookUpTwo = () => Promise.all([driver.stat('a'), driver.stat('b')])
  await lookUpTwo()
  expect(server.count('USER')).toBe(2)
  allowed = 3
  await lookUpTwo()
  expect(server.count('USER')).toBe(2)

  vi.advanceTimersByTime(60_000)
  await lookUpTwo()
  expect(users.size).toBeGreaterThanOrEqual(2)
})

test('a call that waits for a connection ends when the driver is closed, and a later one connects anew', async () => {
  const { server, driver } = await FakeServer.begin({ connections: 1 })
  server.files.set('/a', Buffer.alloc(8_000_000)) // more than what the sockets hold
  const download = await driver.get('a')
  onTestFinished(() => void download.on('error', () => undefined).destroy())
  const waiting = expect(driver.stat('a')).rejects.toMatchObject(aborted)
  await driver[Symbol.asyncDispose]()
  await waiting
  expect(server.count('USER')).toBe(1)
  expect(await driver.stat('a')).toMatchObject({ size: 8_000_000 })
  expect(server.count('USER')).toBe(2)
})

test('a call that is under way is not tried again when the driver is closed', async () => {
  const { server, driver } = await FakeServer.begin()
  server.twists.SIZE = () => {
    driver[Symbol.asyncDispose]().catch(() => undefined)
    return undefined
  }
  await expect(driver.stat('a')).rejects.toMatchObject(aborted)
  expect(server.count('USER')).toBe(1)
})

test('what a backup stores beside its images, and a check of the storage, do not wait for uploads', async () => {
  const { server, driver } = await FakeServer.begin({ connections: 2 })
  const uploads = [1, 2].map(index => endlessUpload(driver, `image/${index}`))
  await expect.poll(() => server.count('STOR')).toBe(1)
  await driver.put('b/vda.blake3', bytesBody(Buffer.alloc(3_000_000)))
  expect((await driver.check()).checks.filter(({ ok }) => !ok)).toEqual([])
  expect(server.count('STOR')).toBe(3)
  for (const { end } of uploads) end()
  await Promise.all(uploads.map(({ stored }) => stored))
})

test('a download goes before an upload that waits, but the next one does not', async () => {
  const { server, driver } = await FakeServer.begin({ connections: 2 })
  server.files.set('/object', Buffer.alloc(100))
  const uploads = [1, 2].map(index => endlessUpload(driver, `image/${index}`))
  await expect.poll(() => server.count('STOR')).toBe(1)
  const waits: boolean[] = []
  const onWait = (wait: boolean) => void waits.push(wait)
  const downloads = [1, 2, 3].map(async () => buffer(await driver.get('object', { onWait })))
  await expect.poll(() => waits).toEqual([true, true, true])
  for (const { end } of uploads) end()
  await Promise.all([...downloads, ...uploads.map(({ stored }) => stored)])
  const transfers = server.commands
    .map(line => line.split(' ')[0])
    .filter(verb => /STOR|RETR/.test(verb ?? ''))
  expect(transfers).toEqual(['STOR', 'RETR', 'STOR', 'RETR', 'RETR'])
})

test('a short download says that it waits while its bytes are collected', async () => {
  const { server, driver } = await FakeServer.begin()
  server.files.set('/a', Buffer.from('abc'))
  const waits: boolean[] = []
  const controller = new AbortController()
  const options = {
    range: { start: 1, end: 3 },
    signal: controller.signal,
    onWait: (wait: boolean) => void waits.push(wait),
  }
  server.twists.RETR = () => '150 Here it comes.' // and it never does
  const silent = expect(driver.get('a', options)).rejects.toMatchObject(aborted)
  await expect.poll(() => waits).toEqual([true])
  controller.abort()
  await silent
  expect(waits).toEqual([true, false])
})
