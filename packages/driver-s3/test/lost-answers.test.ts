import { Readable } from 'node:stream'
import type { UploadBody } from '@varve/core'
import { PatternBody, patternBytes } from '@varve/testkit'
import { expect, test } from 'vitest'
import type { Call, Fault } from './fake-s3.ts'
import { begin, count, MIB, SIZE, slowDown } from './faulty-s3.ts'

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
