import { posix } from 'node:path'
import { Readable } from 'node:stream'
import { buffer } from 'node:stream/consumers'
import { FUZZ_TIMEOUT_MS, fuzz } from '@varve/testkit'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { assertKey, assertRange, bytesBody, isKey, objectNotFound, toUploadBody } from '../src/storage.ts'

const name = fc.stringMatching(/^[a-zA-Z0-9 ._%~ü🙂-]{1,20}$/u)

describe('keys', () => {
  test('plain names joined by slashes are keys', () => {
    fc.assert(
      fc.property(fc.array(name, { minLength: 1, maxLength: 6 }), names => {
        fc.pre(names.every(part => part !== '.' && part !== '..'))
        expect(isKey(names.join('/'))).toBe(true)
      }),
    )
  })

  test('whatever is a key stays below the folder that it is joined to, and is not rewritten by that', {
    timeout: FUZZ_TIMEOUT_MS,
  }, () => {
    const text = fc.oneof(
      fc.string({ unit: 'binary' }),
      fc
        .array(fc.constantFrom('/', '.', '..', 'a', '\\', '\0'), { maxLength: 8 })
        .map(parts => parts.join('')),
    )
    fc.assert(
      fc.property(text, key => {
        if (isKey(key)) expect(posix.join('/root', key)).toBe(`/root/${key}`)
      }),
      fuzz(300),
    )
  })

  test.each([
    ['', 'is empty'],
    ['/a', 'begins or ends with "/"'],
    ['a//b', '"//"'],
    ['a/../b', '".."'],
    ['a\\b', 'backslash'],
    ['a\nb', 'control character'],
    ['\ud800', 'not Unicode'],
    ['x'.repeat(256), '255 bytes'],
    ['x/'.repeat(600), '1024 bytes'],
    ['a/.varve-part-1', 'unfinished uploads'],
  ])('the refusal of %j says why', (key, why) => {
    const refuse = () => assertKey(key)
    expect(refuse).toThrow(expect.objectContaining({ code: 'INVALID_KEY', context: { key } }))
    expect(refuse).toThrow(why)
  })

  test('the limits themselves are allowed', () => {
    expect(isKey('x'.repeat(255))).toBe(true)
    expect(isKey(`${'x/'.repeat(511)}xy`)).toBe(true)
    expect(isKey(`${'x/'.repeat(512)}x`)).toBe(false)
    expect(isKey('ü'.repeat(127))).toBe(true)
    expect(isKey('ü'.repeat(128))).toBe(false)
  })

  test('a prefix may be empty or end with a slash, and is a key otherwise', () => {
    for (const prefix of ['', 'a', 'a/', 'a/b']) expect(() => assertKey(prefix, 'prefix')).not.toThrow()
    for (const prefix of ['/', '//', 'a//', '../', '..', '/a']) {
      expect(() => assertKey(prefix, 'prefix')).toThrow(expect.objectContaining({ code: 'INVALID_KEY' }))
    }
  })
})

test('a range is two whole numbers in order', () => {
  for (const range of [
    { start: 0, end: 0 },
    { start: 5, end: Number.MAX_SAFE_INTEGER },
  ]) {
    expect(() => assertRange(range)).not.toThrow()
  }
  for (const range of [
    { start: -1, end: 2 },
    { start: 3, end: 2 },
    { start: 0.5, end: 2 },
    { start: 0, end: Number.NaN },
    { start: 0, end: 2 ** 53 },
  ]) {
    expect(() => assertRange(range)).toThrow(expect.objectContaining({ code: 'INVALID_ARGUMENT' }))
  }
})

describe('bodies', () => {
  test('a body of bytes opens again and again, also with a range', async () => {
    const body = bytesBody(Buffer.from('0123456789'))
    expect(body).toMatchObject({ size: 10, replayable: true })
    expect(String(await buffer(body.open()))).toBe('0123456789')
    expect(String(await buffer(body.open({ start: 2, end: 5 })))).toBe('234')
    expect(String(await buffer(body.open()))).toBe('0123456789')
  })

  test('a body stays the body that it is', () => {
    const body = bytesBody(Buffer.from('x'))
    expect(toUploadBody(body)).toBe(body)
  })

  test('a stream opens once, as a whole, and not after its end', async () => {
    const refused = expect.objectContaining({ code: 'INVALID_ARGUMENT' })
    const stream = Readable.from([Buffer.from('x')])
    const body = toUploadBody(stream)
    expect(body.replayable).toBe(false)
    expect(() => body.open({ start: 0, end: 1 })).toThrow(refused)
    expect(body.open()).toBe(stream)
    expect(() => body.open()).toThrow(refused)

    const ended = Readable.from([Buffer.from('x')])
    await ended.toArray()
    expect(() => toUploadBody(ended).open()).toThrow(refused)
  })
})

test('an object that is missing is told with its place and what to do', () => {
  expect(objectNotFound('a/b', 's3://c')).toMatchObject({
    code: 'OBJECT_NOT_FOUND',
    message: expect.stringMatching(/^There is no object a\/b in s3:\/\/c\. Put it back/),
    context: { key: 'a/b', location: 's3://c' },
    retryable: false,
  })
})
