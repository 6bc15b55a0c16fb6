import { Readable } from 'node:stream'
import { FUZZ_TIMEOUT_MS, fuzz } from '@varve/testkit'
import fc from 'fast-check'
import { expect, test } from 'vitest'
import * as lsjson from '../src/lsjson.ts'

const asItIs = (text: string) => text
const parseLine = (line: string) => lsjson.parseLine(line, asItIs)
const parseStat = (text: string) => lsjson.parseStat(text, asItIs)
const readLines = (output: Readable) => lsjson.readLines(output, asItIs)

const files = fc.array(
  fc.record({
    path: fc.string({ unit: 'binary', minLength: 1 }),
    size: fc.maxSafeNat(),
    time: fc.date({ noInvalidDate: true }),
  }),
)

test('a listing comes back whole, wherever the pipe cuts it', async () => {
  await fc.assert(
    fc.asyncProperty(files, fc.integer({ min: 1, max: 50 }), async (files, pieceSize) => {
      const expected = files.map(({ path, size, time }) => ({
        path: path.toWellFormed(),
        size,
        modifiedAt: time,
      }))
      const entries = expected.map(({ path, size, modifiedAt }) =>
        JSON.stringify({
          Path: path,
          Name: 'x',
          Size: size,
          ModTime: modifiedAt.toISOString(),
          IsDir: false,
        }),
      )
      const printed = Buffer.from(`[\n${entries.join(',\n')}\n]\n`)
      const pieces: Buffer[] = []
      for (let at = 0; at < printed.length; at += pieceSize) pieces.push(printed.subarray(at, at + pieceSize))
      const parsed = []
      for await (const line of readLines(Readable.from(pieces))) {
        const file = parseLine(line)
        if (file) parsed.push(file)
      }
      expect(parsed).toEqual(expected)
    }),
  )
})

test('a folder, nothing, and a document without a size are no files', () => {
  expect(parseStat('{"Path":"","Size":-1,"IsDir":true}')).toBeUndefined()
  expect(parseStat('null\n')).toBeUndefined()
  expect(parseStat('{"Path":"letter.docx","Size":-1,"IsDir":false}')).toBeUndefined()
})

test('a file without a time is one', () => {
  expect(parseStat('{"Path":"a","Size":3,"ModTime":"","IsDir":false}')).toEqual({ path: 'a', size: 3 })
})

test.each([
  '{"Path":"a","Size":1.5}',
  '{"Path":"a","Size":1e300}',
  '{"Path":"a","Si',
  '<html>',
  '7',
  '{"Size":3}',
  '{"Path":"a","Size":"3"}',
])('what is no entry is an error and no file: %s', text => {
  for (const parse of [parseStat, parseLine]) {
    expect(() => parse(text)).toThrow(expect.objectContaining({ code: 'STORAGE_FAILED' }))
  }
})

test('a mangled listing is refused, or gives files', { timeout: FUZZ_TIMEOUT_MS }, async () => {
  const good =
    '[\n{"Path":"a/b","Name":"b","Size":3,"ModTime":"2026-01-01T00:00:00Z","IsDir":false},\n{"Path":"c","Size":0}\n]\n'
  const change = fc.record({
    at: fc.nat(good.length),
    drop: fc.nat(20),
    insert: fc.oneof(fc.string(), fc.json()),
  })
  await fc.assert(
    fc.asyncProperty(
      fc.array(change, { maxLength: 3 }),
      fc.integer({ min: 1, max: 50 }),
      async (changes, size) => {
        let text = good
        for (const { at, drop, insert } of changes) text = text.slice(0, at) + insert + text.slice(at + drop)
        const bytes = Buffer.from(text)
        const pieces = Array.from({ length: Math.ceil(bytes.length / size) }, (_, i) =>
          bytes.subarray(i * size, (i + 1) * size),
        )
        try {
          for await (const line of readLines(Readable.from(pieces))) {
            const file = parseLine(line)
            if (file) expect(file).toMatchObject({ path: expect.any(String), size: expect.any(Number) })
            if (file) expect(Number.isSafeInteger(file.size) && file.size >= 0, `${file.size}`).toBe(true)
          }
        } catch (error) {
          expect(error).toMatchObject({ name: 'VarveError', code: 'STORAGE_FAILED' })
        }
      },
    ),
    fuzz(500),
  )
})

test('a line without an end is given up', async () => {
  const endless = Readable.from(Array.from({ length: 40 }, () => Buffer.alloc(65_536, 'x')))
  const read = async () => {
    for await (const _ of readLines(endless));
  }
  await expect(read()).rejects.toMatchObject({ code: 'STORAGE_FAILED' })
})
