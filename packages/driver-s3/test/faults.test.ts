import { getEventListeners, once } from 'node:events'
import { Readable } from 'node:stream'
import { buffer } from 'node:stream/consumers'
import { setTimeout as delay } from 'node:timers/promises'
import { crc32 } from 'node:zlib'
import { type UploadBody, VarveError } from '@varve/core'
import { S3Driver, type S3DriverOptions } from '@varve/driver-s3'
import { PatternBody, patternBytes, type Trouble, troubledSource } from '@varve/testkit'
import { expect, onTestFinished, test, vi } from 'vitest'
import { DownloadStream } from '../src/download-stream.ts'
import { type Call, FakeS3, type Fault } from './fake-s3.ts'

const MIB = 1024 * 1024
const SIZE = 6 * MIB + 1
const slowDown: Fault = { when: 'before', answer: { status: 503, code: 'SlowDown' } }
const never = new Promise<never>(() => undefined)

async function begin(options: Partial<S3DriverOptions> = {}, faults: Partial<Record<Call, Fault[]>> = {}) {
  const fake = await FakeS3.start()
  const driver = new S3Driver({ ...fake.options, partSize: 5 * MIB, ...options })
  onTestFinished(async () => {
    await driver[Symbol.asyncDispose]()
    await fake[Symbol.asyncDispose]()
  })
  for (const [call, script] of Object.entries(faults)) fake.faults.set(call as Call, script)
  return { fake, driver }
}

function count(fake: FakeS3, call: Call): number {
  return fake.calls.filter(name => name === call).length
}

test('a small object that meets SlowDown is read anew and sent again', async () => {
  const { fake, driver } = await begin({}, { put: [slowDown, slowDown] })
  const body = new PatternBody({ size: 100_000, seed: 1 })
  const progress: number[] = []
  await driver.put('a', body, { onProgress: bytes => progress.push(bytes) })
  expect(count(fake, 'put')).toBe(3)
  expect(fake.objects.get('a')?.bytes.equals(patternBytes(1, 0, 100_000))).toBe(true)
  expect(progress.at(-1)).toBe(100_000)
  expect(body.faults).toEqual([])
})

test('a part that fails is read again, alone', async () => {
  const cut: Fault = { when: 'before', answer: 'cut' }
  const { fake, driver } = await begin({ parallelParts: 1 }, { part: [slowDown, cut] })
  const body = new PatternBody({ size: SIZE, seed: 2 })
  await driver.put('a', body)
  expect(fake.bodies.slice(0, -1).map(bytes => bytes.length)).toEqual([5 * MIB, 5 * MIB, 5 * MIB, MIB + 1])
  expect(fake.objects.get('a')?.bytes.equals(patternBytes(2, 0, SIZE))).toBe(true)
})

test('the memory of chunks is used again while a part is sent', async () => {
  const { driver } = await begin()
  const body = new PatternBody({ size: 20 * MIB, chunkSize: 64 * 1024 })
  await driver.put('a', body)
  expect(body.faults).toEqual([])
  expect(body.allocations).toBeLessThan(64) // of 320 chunks
})

test('a stream of unknown size has parts of one size where they must be, and of growing sizes else', async () => {
  const sizes = async (options: Partial<S3DriverOptions>) => {
    const { fake, driver } = await begin({ parallelParts: 1, ...options })
    await driver.put('a', Readable.from(new Array(34).fill(Buffer.alloc(MIB))))
    return fake.bodies.slice(0, -1).map(bytes => bytes.length / MIB) // without the completion
  }
  expect(await sizes({ equalParts: true })).toEqual([32, 2])
  expect(await sizes({ maxParts: 20 })).toEqual([8, 16, 10])
})

test('a completion that answers 200 with an error in it is made again', async () => {
  const inBody: Fault = { when: 'before', answer: { status: 200, code: 'InternalError' } }
  const { fake, driver } = await begin({}, { complete: [inBody] })
  await driver.put('a', new PatternBody({ size: SIZE, seed: 3 }))
  expect(count(fake, 'complete')).toBe(2)
  expect(fake.objects.get('a')?.bytes.equals(patternBytes(3, 0, SIZE))).toBe(true)
})

test.each<[string, Fault['answer']]>([
  ['whose connection is cut', 'cut'],
  ['that answers InternalError', { status: 500, code: 'InternalError' }],
  ['that answers 200 with an error in it', { status: 200, code: 'InternalError' }],
])('a completion %s after it has succeeded is a success', async (_, answer) => {
  const { fake, driver } = await begin({}, { complete: [{ when: 'after', answer }] })
  await driver.put('a', new PatternBody({ size: SIZE, seed: 4 }))
  expect(count(fake, 'complete')).toBe(1)
  expect(count(fake, 'abort')).toBe(0)
  expect(fake.objects.get('a')?.bytes.equals(patternBytes(4, 0, SIZE))).toBe(true)
})

test.each([true, false])(
  'a completion whose answer, and the question after it, are lost is a success where no upload is left: replayable %s',
  async replayable => {
    const lost: Fault = { when: 'after', answer: 'cut' }
    const { fake, driver } = await begin({ retries: 0 }, { complete: [lost], head: [slowDown] })
    const size = 9 * MIB
    await driver.put('a', new PatternBody({ size, seed: 4, replayable }))
    expect(fake.calls.slice(-4)).toEqual(['complete', 'head', 'abort', 'head'])
    expect(fake.objects.get('a')?.bytes.equals(patternBytes(4, 0, size))).toBe(true)
  },
)

test('an object is told to be unknown whose completion, and every question, are lost', async () => {
  const lost: Fault = { when: 'after', answer: 'cut' }
  const notKnown = { retryable: true, message: expect.stringContaining('a all the same is not known') }
  const unasked = await begin({ retries: 0 }, { complete: [lost], head: [slowDown, slowDown] })
  await expect(unasked.driver.put('a', new PatternBody({ size: SIZE }))).rejects.toMatchObject(notKnown)
  const unreached = await begin({ retries: 0 }, { complete: [lost], head: [slowDown], abort: [slowDown] })
  await expect(unreached.driver.put('a', new PatternBody({ size: SIZE }))).rejects.toMatchObject(notKnown)
})

test('a completion that fails for good is no success because a former object is there', async () => {
  const refusal: Fault = { when: 'before', answer: { status: 400, code: 'InvalidPart' } }
  const { fake, driver } = await begin({}, { complete: [refusal] })
  const former = { bytes: patternBytes(5, 0, SIZE), tag: 'another upload' }
  fake.objects.set('a', former)
  await expect(driver.put('a', new PatternBody({ size: SIZE, seed: 6 }))).rejects.toMatchObject({
    code: 'STORAGE_FAILED',
    message: expect.stringContaining('InvalidPart'),
  })
  expect(fake.objects.get('a')).toBe(former)
  expect(fake.uploads.size).toBe(0)
})

test('a small object whose answer is lost each time is a success when the storage has it', async () => {
  const lost: Fault = { when: 'after', answer: 'cut' }
  const { fake, driver } = await begin({ retries: 1 }, { put: [lost, lost] })
  await driver.put('a', new PatternBody({ size: 10, seed: 7 }))
  expect(fake.calls).toEqual(['put', 'put', 'head'])
})

test.each<[string, Partial<Record<Call, Fault[]>>]>([
  ['an answer that is lost', {}],
  ['an answer and a lookup that are lost', { head: [slowDown] }],
])('%s is no failure because the source cannot be read again', async (_, faults) => {
  const lost: Fault = { when: 'after', answer: 'cut' }
  const { fake, driver } = await begin({}, { put: [lost], ...faults })
  const bytes = patternBytes(12, 0, 10)
  let opened = 0
  const body: UploadBody = {
    size: 10,
    replayable: true,
    open: () => Readable.from(opened++ === 0 ? [bytes] : []),
  }
  await driver.put('a', body)
  expect(opened).toBe(2)
  expect(fake.objects.get('a')?.bytes.equals(bytes)).toBe(true)
})

test('an upload whose answers are lost says so where the storage cannot tell what it has', async () => {
  const lost: Fault = { when: 'after', answer: 'cut' }
  const { driver } = await begin({ retries: 0 }, { put: [lost], head: [slowDown] })
  const upload = driver.put('a', new PatternBody({ size: 10 }))
  await expect(upload).rejects.toMatchObject({
    code: 'STORAGE_UNREACHABLE',
    message: expect.stringContaining('a all the same is not known'),
    retryable: true,
  })
})

test('an upload whose answer is lost is a failure where the storage has the object of another', async () => {
  const cut: Fault = { when: 'before', answer: 'cut' }
  const { fake, driver } = await begin({ retries: 1 }, { put: [cut, cut] })
  const former = { bytes: patternBytes(13, 0, 10), tag: 'another upload' }
  fake.objects.set('a', former)
  const upload = driver.put('a', new PatternBody({ size: 10 }))
  await expect(upload).rejects.toMatchObject({ code: 'STORAGE_UNREACHABLE' })
  expect(fake.objects.get('a')).toBe(former)
})

test('an upload whose answer is lost is a failure where the storage has only a part of it', async () => {
  const { fake, driver } = await begin({ retries: 0 })
  const cutShort = async () => {
    const stored = fake.objects.get('a')
    if (stored) fake.objects.set('a', { ...stored, bytes: stored.bytes.subarray(0, 5) })
    throw new Error('and the connection is cut')
  }
  fake.faults.set('put', [{ when: 'after', answer: cutShort }])
  const upload = driver.put('a', new PatternBody({ size: 10 }))
  await expect(upload).rejects.toMatchObject({ code: 'STORAGE_UNREACHABLE' })
  expect(fake.calls).toEqual(['put', 'head'])
  expect(fake.objects.get('a')?.bytes.length).toBe(5)
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

test.each([10, 300_000, SIZE])('an upload of %d bytes leaves nothing on its signal', async size => {
  const { driver } = await begin()
  const { signal } = new AbortController()
  await driver.put('a', new PatternBody({ size }), { signal })
  await driver.put('a', new PatternBody({ size, replayable: false }), { signal })
  await buffer(await driver.get('a', { signal }))
  expect(getEventListeners(signal, 'abort')).toEqual([])
})

test.each([
  ['of one chunk', 10, MIB],
  ['of several chunks', MIB, MIB / 4],
  ['of several parts', SIZE, MIB / 4],
  ['whose last part is small', 5 * MIB + 1000, MIB / 4],
])(
  'an upload %s whose onProgress throws fails, is not tried again, and leaves nothing',
  async (_, size, chunkSize) => {
    const { fake, driver } = await begin({ parallelParts: 1 })
    for (const replayable of [true, false]) {
      for (const from of [0, size]) {
        const error = Object.assign(new Error('nobody looks'), { code: 'EPIPE' }) // which may pass, from the network
        let thrown = 0
        const onProgress = (bytes: number) => {
          if (bytes < from) return
          thrown++
          throw error
        }
        const body = new PatternBody({ size, replayable, chunkSize })
        const open = vi.spyOn(body, 'open')
        const upload = driver.put('a', body, { onProgress })
        await expect(upload).rejects.toBe(error)
        expect(thrown).toBeGreaterThan(0)
        expect(fake.objects.size).toBe(0)
        expect(fake.uploads.size).toBe(0)
        expect(open.mock.calls.length, 'once, or once a part').toBeLessThanOrEqual(2)
      }
    }
  },
)

test('an upload that was begun, but whose answer was lost, is removed', async () => {
  const lost: Fault = { when: 'after', answer: 'cut' }
  const { fake, driver } = await begin({}, { create: [lost] })
  await driver.put('a', new PatternBody({ size: SIZE }))
  expect(count(fake, 'create')).toBe(2)
  expect(fake.objects.has('a')).toBe(true)
  expect(fake.uploads.size).toBe(0)
})

test('an upload that was begun, but whose beginning was answered with 500, is removed', async () => {
  const failed: Fault = { when: 'after', answer: { status: 500, code: 'InternalError' } }
  const { fake, driver } = await begin({}, { create: [failed] })
  await driver.put('a', new PatternBody({ size: SIZE }))
  expect(count(fake, 'create')).toBe(2)
  expect(fake.uploads.size).toBe(0)
})

test.each<[string, Fault, boolean]>([
  ['is lost', { when: 'after', answer: 'cut' }, true],
  ['is 500', { when: 'after', answer: { status: 500, code: 'InternalError' } }, true],
  ['is a refusal', { when: 'before', answer: { status: 403, code: 'AccessDenied' } }, false],
])('an upload that cannot begin since the answer %s says whether it may be left', async (_, fault, told) => {
  const { fake, driver } = await begin({ retries: 0 }, { create: [fault] })
  const error = await driver.put('a', new PatternBody({ size: SIZE })).catch(error => error)
  expect(error).toMatchObject({ code: expect.stringMatching(/^STORAGE_/) })
  expect(error.message.includes('may have begun an upload of a all the same')).toBe(told)
  expect(fake.uploads.size).toBe(told ? 1 : 0)
  expect(await driver.cleanUp({ olderThan: new Date(Date.now() + 1) })).toBe(told ? 1 : 0)
})

test('an upload that never reached a server leaves nothing, and says nothing of it', async () => {
  const { fake, driver } = await begin({ retries: 0 })
  await fake[Symbol.asyncDispose]()
  const error = await driver.put('a', new PatternBody({ size: SIZE })).catch(error => error)
  expect(error).toMatchObject({ code: 'STORAGE_UNREACHABLE' })
  expect(error.message).not.toContain('may have begun')
})

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

test('uploads of somebody else stay when the answer to the beginning of one is lost', async () => {
  const lost: Fault = { when: 'after', answer: 'cut' }
  const { fake, driver } = await begin({}, { create: [lost] })
  const now = Date.now()
  const theirs = { key: 'a', tag: undefined, parts: new Map<number, Buffer>() }
  fake.uploads.set('before', { ...theirs, begunAt: new Date(now - 10_000) })
  fake.uploads.set('after', { ...theirs, begunAt: new Date(now + 3_600_000) })
  fake.uploads.set('with a part', { ...theirs, begunAt: new Date(now), parts: new Map([[1, Buffer.of(1)]]) })
  fake.uploads.set('of another object', { ...theirs, key: 'ab', begunAt: new Date(now) })
  await driver.put('a', new PatternBody({ size: SIZE }))
  expect([...fake.uploads.keys()]).toEqual(['before', 'after', 'with a part', 'of another object'])
})

test('an upload whose beginning is not answered yet stays when the answer to another of the object is lost', async () => {
  const [begun, answered] = [Promise.withResolvers<void>(), Promise.withResolvers<void>()]
  const answerLate = () => {
    begun.resolve()
    return answered.promise
  }
  const late: Fault = { when: 'after', answer: answerLate }
  const lost: Fault = { when: 'after', answer: 'cut' }
  const { fake, driver } = await begin({}, { create: [late, lost] })
  await using other = new S3Driver({ ...fake.options, partSize: 5 * MIB })
  const first = driver.put('a', new PatternBody({ size: SIZE, seed: 14 }))
  await begun.promise
  await other.put('a', new PatternBody({ size: SIZE, seed: 15 }))
  expect(fake.objects.get('a')?.bytes.equals(patternBytes(15, 0, SIZE))).toBe(true)
  answered.resolve()
  await first
  expect(fake.objects.get('a')?.bytes.equals(patternBytes(14, 0, SIZE))).toBe(true)
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

test.each([
  ['encodes', true],
  ['does not encode', false],
])('names are read as they are from a server that %s them', async (_, encodesNames) => {
  const { fake, driver } = await begin()
  fake.encodesNames = encodesNames
  const keys = ['100%25', 'a%20b', 'a+b', 'a b', 'ü/%zz']
  for (const key of keys) fake.objects.set(key, { bytes: Buffer.of(1), tag: undefined })
  const listed: string[] = []
  for await (const { key } of driver.list('')) listed.push(key)
  expect(listed).toEqual(keys)

  for (const key of keys) {
    fake.uploads.set(`of ${key}`, { key, tag: undefined, begunAt: new Date(0), parts: new Map() })
  }
  expect(await driver.cleanUp({ olderThan: new Date() })).toBe(keys.length)
  expect(fake.uploads.size).toBe(0)
  const removed = fake.requests.filter(({ method }) => method === 'DELETE')
  expect(removed.map(({ url }) => decodeURIComponent(url?.split('?')[0] ?? '').slice('/b/'.length))).toEqual(
    keys,
  )
})

test('a listing that does not say where it goes on is an error', async () => {
  const { fake, driver } = await begin()
  fake.endless = true
  const error = { code: 'STORAGE_FAILED', message: expect.stringContaining('does not go on') }
  await expect(driver.list('').next()).rejects.toMatchObject(error)
  await expect(driver.cleanUp({ olderThan: new Date() })).rejects.toMatchObject(error)
})

test('with WHEN_SUPPORTED an upload ends with its CRC32, and memory is used again too', async () => {
  const { fake, driver } = await begin({ checksums: 'WHEN_SUPPORTED' })
  const body = new PatternBody({ size: 4 * MIB, seed: 11, chunkSize: 64 * 1024 })
  await driver.put('a', body)
  expect(body.faults).toEqual([])
  expect(body.allocations).toBeLessThan(64)
  const checksum = Buffer.alloc(4)
  checksum.writeUInt32BE(crc32(patternBytes(11, 0, body.size)))
  const sent = fake.bodies[0]?.subarray(-100).toString('latin1')
  expect(sent).toContain(`\r\n0\r\nx-amz-checksum-crc32:${checksum.toString('base64')}\r\n\r\n`)
  expect(fake.requests[0]?.headers).toMatchObject({ 'x-amz-decoded-content-length': String(body.size) })
})

test('with WHEN_SUPPORTED an upload in parts is completed with the CRC32 of each of them', async () => {
  const { fake, driver } = await begin({ checksums: 'WHEN_SUPPORTED' })
  await driver.put('a', new PatternBody({ size: SIZE, seed: 20 }))
  const request = (call: Call) => fake.requests[fake.calls.indexOf(call)]
  expect(request('create')?.headers).toMatchObject({ 'x-amz-checksum-algorithm': 'CRC32' })
  expect(request('part')?.headers).toMatchObject({ 'x-amz-trailer': 'x-amz-checksum-crc32' })
  const checksums = [patternBytes(20, 0, 5 * MIB), patternBytes(20, 5 * MIB, MIB + 1)].map(part => {
    const checksum = Buffer.alloc(4)
    checksum.writeUInt32BE(crc32(part))
    return checksum.toString('base64')
  })
  const completion = fake.bodies.at(-1)?.toString() ?? ''
  const completed = [...completion.matchAll(/<Part>.*?<\/Part>/g)].map(([part]) => [
    /<PartNumber>(\d+)</.exec(part)?.[1],
    /<ChecksumCRC32>([^<]+)</.exec(part)?.[1],
  ])
  expect(completed).toEqual([
    ['1', checksums[0]],
    ['2', checksums[1]],
  ])
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
  const { fake, driver } = await begin({ timeoutMs: 300 }, { put: [silent], part: [silent] })
  await driver.put('a', new PatternBody({ size, seed: 21 }))
  expect(count(fake, 'put') + count(fake, 'part')).toBe(size === 10 ? 2 : 3)
  expect(fake.objects.get('a')?.bytes.equals(patternBytes(21, 0, size))).toBe(true)
})

test('settings of new objects go with each way of making one', async () => {
  const { fake, driver } = await begin({
    storageClass: 'STANDARD_IA',
    serverSideEncryption: 'aws:kms',
    kmsKeyId: 'key-1',
    sessionToken: 'session',
  })
  await driver.put('small', new PatternBody({ size: 10 }))
  await driver.put('large', new PatternBody({ size: SIZE }))
  for (const call of ['put', 'create'] as const) {
    expect(fake.requests[fake.calls.indexOf(call)]?.headers, call).toMatchObject({
      'x-amz-storage-class': 'STANDARD_IA',
      'x-amz-server-side-encryption': 'aws:kms',
      'x-amz-server-side-encryption-aws-kms-key-id': 'key-1',
      'x-amz-security-token': 'session',
    })
  }
})
