import { setTimeout as delay } from 'node:timers/promises'
import { PatternBody, patternBytes, type Trouble, troubledSource } from '@varve/testkit'
import { expect, onTestFinished, test, vi } from 'vitest'
import type { Call, Fault } from './fake-s3.ts'
import { begin, count, MIB, never, SIZE } from './faulty-s3.ts'

test.each<[Call, number]>([
  ['put', 300_000],
  ['part', SIZE],
])('an answer of 200 to a %s before the storage has all of it is no success', async (call, size) => {
  const { fake, driver } = await begin({ parallelParts: 1 })
  fake.hasty.add(call)
  const half = () => troubledSource({ kind: 'wait', resumed: never, size }, { bytes: 150_000 })
  await expect(driver.put('a', { size, replayable: true, open: half })).rejects.toMatchObject({
    code: 'STORAGE_FAILED',
    message: expect.stringContaining('before it was sent all of the body'),
  })
  expect(fake.objects.size).toBe(0)
  expect(fake.uploads.size).toBe(0)
})

test.each<[string, Trouble]>([
  ['fails', { kind: 'fail', error: new Error('boom') }],
  ['is cut off', { kind: 'vanish' }],
])('a stream that %s after its first part leaves nothing', async (_, trouble) => {
  const { fake, driver } = await begin()
  const source = troubledSource(trouble, { bytes: 9 * MIB })
  await expect(driver.put('a', source)).rejects.toMatchObject({ code: 'UPLOAD_FAILED' })
  expect(count(fake, 'create')).toBe(1)
  expect(count(fake, 'abort')).toBe(1)
  expect(fake.uploads.size).toBe(0)
  expect(fake.objects.size).toBe(0)
})

test('a stream one of whose parts is refused fails with that and leaves nothing', async () => {
  const refusal: Fault = { when: 'before', answer: { status: 403, code: 'AccessDenied' } }
  const { fake, driver } = await begin({}, { part: [refusal] })
  const source = troubledSource({ kind: 'wait', resumed: never, size: 20 * MIB }, { bytes: 9 * MIB })
  await expect(driver.put('a', source)).rejects.toMatchObject({ code: 'STORAGE_ACCESS_DENIED' })
  expect(source.destroyed).toBe(true)
  expect(fake.uploads.size).toBe(0)
})

test.each([10, SIZE])('a request of %d bytes that is not answered in time is made again', async size => {
  const silent: Fault = { when: 'before', answer: () => never }
  const timeoutMs = size === 10 ? 300 : 1500 // a busy machine takes a while for megabytes
  const { fake, driver } = await begin({ timeoutMs }, { put: [silent], part: [silent] })
  await driver.put('a', new PatternBody({ size, seed: 21 }))
  expect(count(fake, 'put') + count(fake, 'part')).toBe(size === 10 ? 2 : 3)
  expect(fake.objects.get('a')?.bytes.equals(patternBytes(21, 0, size))).toBe(true)
})

test('the last of a body may be on its way for as long as all of it took to send, and not for ever', async () => {
  const timeoutMs = 200
  const onItsWay: Fault = { when: 'after', answer: () => delay(3 * timeoutMs) }
  const silent: Fault = { when: 'before', answer: () => never }
  const { fake, driver } = await begin({ timeoutMs, retries: 0 }, { put: [onItsWay, silent] })
  const slowly = (key: string) => {
    const sent = delay(4 * timeoutMs)
    const source = troubledSource({ kind: 'wait', resumed: sent, size: 300_000 }, { bytes: 200_000 })
    return driver.put(key, { size: 300_000, replayable: true, open: () => source })
  }
  await slowly('a')
  expect(fake.calls).toEqual(['put'])
  expect(fake.objects.get('a')?.bytes.equals(patternBytes(0, 0, 300_000))).toBe(true)
  await expect(slowly('b')).rejects.toMatchObject({
    code: 'STORAGE_UNREACHABLE',
    message: expect.stringContaining('no progress'),
  })
})

test.each(['InvalidAccessKeyId', 'SignatureDoesNotMatch', 'ExpiredToken', 'AccessDenied'])(
  'a request that is refused with %s is not made again, and the error holds no secret',
  async code => {
    const refusal: Fault = { when: 'before', answer: { status: 403, code } }
    const { fake, driver } = await begin({}, { put: [refusal] })
    const error = await driver.put('a', new PatternBody({ size: 10 })).catch(error => error)
    expect(error).toMatchObject({ code: 'STORAGE_ACCESS_DENIED', message: expect.stringContaining(code) })
    expect(`${error.stack} ${JSON.stringify(error)} ${error.cause.stack}`).not.toContain('the-secret')
    expect(fake.calls).toEqual(['put'])
  },
)

test('a quota that is used up is STORAGE_FULL', async () => {
  const full: Fault = { when: 'before', answer: { status: 403, code: 'QuotaExceeded' } }
  const { driver } = await begin({}, { put: [full] })
  await expect(driver.put('a', new PatternBody({ size: 10 }))).rejects.toMatchObject({ code: 'STORAGE_FULL' })
})

test('an upload that is given up while the storage is silent ends soon', async () => {
  const came = Promise.withResolvers<void>()
  const over = new AbortController()
  const silentAfter = (then: () => void): Fault => ({
    when: 'before',
    answer: () => {
      then()
      return never
    },
  })
  const faults = { put: [silentAfter(came.resolve)], head: [silentAfter(() => over.abort())] }
  const { fake, driver } = await begin({}, faults)
  vi.useFakeTimers({ toFake: ['setTimeout', 'clearTimeout'] })
  const timeout = vi.spyOn(AbortSignal, 'timeout').mockReturnValue(over.signal)
  onTestFinished(() => {
    vi.useRealTimers()
    timeout.mockRestore()
  })
  const controller = new AbortController()
  const upload = driver.put('a', new PatternBody({ size: 10 }), { signal: controller.signal })
  await came.promise
  controller.abort()
  vi.advanceTimersByTime(10_000)
  await expect(upload).rejects.toMatchObject({
    code: 'ABORTED',
    message: expect.stringContaining('a all the same is not known'),
  })
  expect(timeout).toHaveBeenCalledWith(10_000)
  expect(fake.calls).toEqual(['put', 'head'])
})
