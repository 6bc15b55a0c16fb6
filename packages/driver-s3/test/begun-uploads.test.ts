import { S3Driver } from '@varve/driver-s3'
import { PatternBody, patternBytes } from '@varve/testkit'
import { expect, test } from 'vitest'
import type { Fault } from './fake-s3.ts'
import { begin, count, MIB, SIZE } from './faulty-s3.ts'

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
