import { once } from 'node:events'
import { Readable } from 'node:stream'
import { buffer } from 'node:stream/consumers'
import { setTimeout as delay } from 'node:timers/promises'
import { VarveError } from '@varve/core'
import { patternBytes } from '@varve/testkit'
import { expect, test } from 'vitest'
import { DownloadStream } from '../src/download-stream.ts'
import type { FakeS3 } from './fake-s3.ts'
import { begin } from './faulty-s3.ts'

test('a download that is cut goes on where it broke off, with the same object', async () => {
  const { fake, driver } = await begin()
  const bytes = patternBytes(8, 0, 300_000)
  fake.objects.set('a', { bytes, tag: undefined })
  fake.cutDownloadAfter = 100_000
  expect((await buffer(await driver.get('a'))).equals(bytes)).toBe(true)
  const [first, second] = fake.requests
  expect(first?.headers.range).toBeUndefined()
  expect(second?.headers).toMatchObject({
    range: expect.stringMatching(/^bytes=\d+-299999$/),
    'if-match': expect.any(String),
  })
})

test.each([256 * 1024, 300_000])(
  'a reader that pauses before all of %d bytes, which have come, gets them',
  async size => {
    const timeoutMs = 200
    const { fake, driver } = await begin({ timeoutMs, retries: 0 })
    const bytes = patternBytes(17, 0, size)
    fake.objects.set('a', { bytes, tag: undefined })
    const download = await driver.get('a')
    await once(download, 'readable')
    await delay(4 * timeoutMs)
    expect((await buffer(download)).equals(bytes)).toBe(true)
    expect(fake.calls).toEqual(['get'])
  },
)

test('a connection that fails after the last byte of a download does not fail it', async () => {
  const source = new Readable({ read: () => undefined })
  const download = new DownloadStream(source, {
    range: { start: 0, end: 10 },
    open: () => expect.unreachable('all bytes have come'),
    retries: 1,
    error: error => new VarveError('STORAGE_FAILED', String(error)),
  })
  source.push(patternBytes(18, 0, 10))
  await once(download, 'readable')
  source.destroy(Object.assign(new Error('the connection was reset'), { code: 'ECONNRESET' }))
  expect((await buffer(download)).equals(patternBytes(18, 0, 10))).toBe(true)
})

test('a download whose object is replaced while the connection is cut fails', async () => {
  const { fake, driver } = await begin()
  fake.objects.set('a', { bytes: patternBytes(9, 0, 300_000), tag: undefined })
  fake.cutDownloadAfter = 100_000
  const download = await driver.get('a')
  fake.objects.set('a', { bytes: patternBytes(10, 0, 300_000), tag: undefined })
  await expect(buffer(download)).rejects.toMatchObject({ code: 'STORAGE_FAILED', retryable: true })
})

test.each<[string, number, Partial<FakeS3>]>([
  ['of another ETag', 300_000, { heedsIfMatch: false }],
  ['of another size', 400_000, { etagOf: () => '"same"' }],
])('a download that goes on with an object %s than at first fails', async (_, size, differences) => {
  const { fake, driver } = await begin()
  Object.assign(fake, differences)
  fake.objects.set('a', { bytes: patternBytes(9, 0, 300_000), tag: undefined })
  fake.cutDownloadAfter = 100_000
  const download = await driver.get('a')
  fake.objects.set('a', { bytes: patternBytes(10, 0, size), tag: undefined })
  await expect(buffer(download)).rejects.toMatchObject({
    code: 'STORAGE_FAILED',
    message: expect.stringContaining('was replaced'),
    retryable: true,
  })
})

test('a range of which the storage sends only a part, and says so, fails', async () => {
  const { fake, driver } = await begin({ retries: 0 })
  fake.objects.set('a', { bytes: patternBytes(19, 0, 10_000), tag: undefined })
  fake.mostOfRange = 1000
  const error = { code: 'STORAGE_FAILED', message: expect.stringContaining('something else than the bytes') }
  await expect(driver.get('a', { range: { start: 0, end: 5000 } })).rejects.toMatchObject(error)
  await expect(driver.get('a', { range: { start: 8500, end: 20_000 } })).rejects.toMatchObject(error)
  const rest = await buffer(await driver.get('a', { range: { start: 9500, end: 20_000 } }))
  expect(rest.equals(patternBytes(19, 9500, 500))).toBe(true)
})

test('a download that is cut does not go on where nothing tells that the object is the same', async () => {
  const { fake, driver } = await begin()
  fake.etagOf = () => undefined
  fake.objects.set('a', { bytes: patternBytes(9, 0, 300_000), tag: undefined })
  fake.cutDownloadAfter = 100_000
  const download = await driver.get('a')
  fake.objects.set('a', { bytes: patternBytes(10, 0, 300_000), tag: undefined })
  await expect(buffer(download)).rejects.toMatchObject({
    code: 'STORAGE_UNREACHABLE',
    message: expect.stringContaining('ETag'),
    retryable: true,
  })
})
