import { ExtentKind, isVarveError, type RbdDiff } from '@varve/core'
import { FUZZ_TIMEOUT_MS, fuzz } from '@varve/testkit'
import fc from 'fast-check'
import { expect, test } from 'vitest'
import { DiffParser } from '../src/diff-parser.ts'
import {
  applyDiff,
  diffs,
  type ModelDiff,
  nameRecord,
  patternByte,
  rangeRecord,
  sizeRecord,
  streamBytes,
} from './stream-model.ts'

function parse(bytes: Uint8Array, cuts: readonly number[] = []): RbdDiff {
  const parser = new DiffParser()
  const places = [0, ...cuts.map(cut => cut % (bytes.length + 1)), bytes.length].sort((a, b) => a - b)
  for (let i = 1; i < places.length; i++) parser.push(bytes.subarray(places[i - 1], places[i]))
  return parser.finish()
}

/** What a disk full of 0xff reads as after a diff, by its model. */
function expectedDisk({ size, records }: ModelDiff): Buffer {
  const disk = Buffer.alloc(size, 0xff)
  for (const { start, length, isData } of records)
    for (let i = start; i < start + length; i++) disk[i] = isData ? patternByte(i) : 0
  return disk
}

test('a stream is understood wherever it is cut into pieces', () => {
  fc.assert(
    fc.property(diffs, fc.array(fc.nat(), { maxLength: 50 }), (model, cuts) => {
      const bytes = streamBytes(model)
      const diff = parse(bytes, cuts)
      expect(diff).toMatchObject({ toSnapshot: model.to, size: model.size, streamSize: bytes.length })
      expect(diff.fromSnapshot).toBe(model.from)
      expect(diff.dataSize).toBe(
        model.records.filter(({ isData }) => isData).reduce((sum, { length }) => sum + length, 0),
      )
      expect(applyDiff(diff, bytes, Buffer.alloc(model.size, 0xff))).toEqual(expectedDisk(model))
    }),
  )
})

test('a stream that breaks off anywhere is refused', () => {
  fc.assert(
    fc.property(diffs, fc.nat(), (model, at) => {
      const bytes = streamBytes(model)
      expect(() => parse(bytes.subarray(0, at % bytes.length))).toThrow(/cut short/)
    }),
  )
})

test('a stream that goes on after its end mark is refused', () => {
  fc.assert(
    fc.property(diffs, fc.uint8Array({ minLength: 1, maxLength: 40 }), (model, more) => {
      expect(() => parse(Buffer.concat([streamBytes(model), more]))).toThrow(/after its end mark/)
    }),
  )
})

test('a mangled stream is refused, or understood within its bounds', { timeout: FUZZ_TIMEOUT_MS }, () => {
  fc.assert(
    fc.property(
      diffs,
      fc.array(fc.record({ at: fc.nat(), value: fc.nat(255) }), { minLength: 1, maxLength: 4 }),
      (model, changes) => {
        const bytes = streamBytes(model)
        for (const { at, value } of changes) bytes[at % bytes.length] = value
        try {
          const diff = parse(bytes)
          if (diff.size > 2 ** 20) return
          applyDiff(diff, bytes, Buffer.alloc(0))
          expect(diff.streamSize).toBe(bytes.length)
          for (let i = 0; i < diff.extents.count; i++) {
            if (diff.extents.kind(i) !== ExtentKind.data) continue
            expect(diff.extents.fileOffset(i) + diff.extents.length(i)).toBeLessThan(bytes.length)
          }
        } catch (error) {
          if (!isVarveError(error, 'RBD_STREAM_INVALID')) throw error
        }
      },
    ),
    fuzz(1000),
  )
})

const banner = Buffer.from('rbd diff v1\n')
const head = Buffer.concat([banner, nameRecord('t', 'b'), sizeRecord(1000)])
const end = Buffer.from('e')

test.for<[string, Buffer[], RegExp]>([
  ['of version 2', [Buffer.from('rbd diff v2\n')], /version 2/],
  ['that is something else', [Buffer.from('QFI\xfb000000000')], /does not begin/],
  ['with an unknown record', [head, Buffer.from('x')], /kind 0x78/],
  ['with two sizes', [head, sizeRecord(10)], /size twice/],
  ['that names a snapshot twice', [head, nameRecord('t', 'c')], /snapshot twice/],
  ['with a range before its size', [banner, rangeRecord('z', 0, 10)], /begin with the image's size/],
  ['without a size', [banner, nameRecord('t', 'b'), end], /begin with the image's size/],
  ['of no snapshot', [banner, sizeRecord(1000), end], /names no snapshot/],
  ['with an endless name', [banner, Buffer.from('t\xff\xff\xff\xff', 'latin1')], /name of 4294967295 bytes/],
  ['with an empty name', [banner, Buffer.from('t\0\0\0\0')], /name of 0 bytes/],
  ['with a name of broken text', [banner, Buffer.from('t\x01\0\0\0\xff', 'latin1')], /no UTF-8/],
  ['with an overlap', [head, rangeRecord('z', 0, 10), rangeRecord('z', 9, 10)], /after one that ends at 10/],
  ['that goes back', [head, rangeRecord('z', 500, 10), rangeRecord('z', 0, 10)], /after one that ends/],
  ['with a range over its end', [head, rangeRecord('w', 990, 11)], /11 bytes in an image of 1000/],
  ['with a range behind its end', [head, rangeRecord('w', 2000, 1)], /in an image of 1000/],
  ['with a huge number', [head, Buffer.from('z'), Buffer.alloc(16, 0xff)], /above 2\^52/],
])('a stream %s is refused', ([, parts, message]) => {
  expect(() => parse(Buffer.concat(parts))).toThrow(message)
  expect(() => parse(Buffer.concat(parts))).toThrow(expect.objectContaining({ code: 'RBD_STREAM_INVALID' }))
})

test('an empty increment, and an empty image, are understood', () => {
  const increment = parse(Buffer.concat([banner, nameRecord('f', 'a'), head.subarray(12), end]))
  expect(increment).toMatchObject({ fromSnapshot: 'a', toSnapshot: 'b', size: 1000, dataSize: 0 })
  expect(increment.extents).toMatchObject({ count: 1 })
  expect(increment.extents.kind(0)).toBe(ExtentKind.unallocated)
  expect(parse(Buffer.concat([banner, nameRecord('t', 'b'), sizeRecord(0), end])).extents.count).toBe(0)
})

test('a million records take less than 64 MiB', () => {
  const count = 1_000_000
  const record = rangeRecord('w', 0, 16)
  const one = Buffer.concat([record, Buffer.alloc(16, 7)])
  const parser = new DiffParser()
  parser.push(Buffer.concat([banner, nameRecord('t', 'b'), sizeRecord(count * 1024)]))
  const before = process.memoryUsage().arrayBuffers
  for (let i = 0; i < count; i++) {
    one.writeBigUInt64LE(BigInt(i * 1024), 1)
    parser.push(one)
  }
  expect(process.memoryUsage().arrayBuffers - before).toBeLessThan(64 * 2 ** 20)
  parser.push(end)
  expect(parser.finish().extents.count).toBe(2 * count)
})
