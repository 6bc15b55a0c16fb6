import { ExtentKind, ImageExtents } from '@varve/qcow2'
import { FUZZ_TIMEOUT_MS, fuzz } from '@varve/testkit'
import fc from 'fast-check'
import { expect, test } from 'vitest'
import { isVarveError } from '../src/errors.ts'
import type { RbdDiff } from '../src/rbd.ts'
import { decodeDiffIndex, encodeDiffIndex } from '../src/rbd-diff-index.ts'

const lengths = fc.oneof(fc.integer({ min: 1, max: 300 }), fc.integer({ min: 1, max: 2 ** 40 }))

/** Diffs such as a stream of records gives, with runs that are short or long. */
const diffs: fc.Arbitrary<RbdDiff> = fc
  .record({
    fromSnapshot: fc.option(fc.string({ unit: 'binary', minLength: 1, maxLength: 40 }), { nil: undefined }),
    toSnapshot: fc.string({ unit: 'binary', minLength: 1, maxLength: 40 }),
    runs: fc.array(fc.record({ kind: fc.constantFrom(...Object.values(ExtentKind)), length: lengths }), {
      maxLength: 60,
    }),
  })
  .map(({ fromSnapshot, toSnapshot, runs }) => {
    const extents = new ImageExtents()
    let [size, dataSize, streamSize] = [0, 0, 40]
    for (const { kind, length } of runs) {
      extents.append(length, kind, streamSize + 17)
      size += length
      if (kind === ExtentKind.data) dataSize += length
      if (kind !== ExtentKind.unallocated) streamSize += 17 + (kind === ExtentKind.data ? length : 0)
    }
    const from = fromSnapshot === undefined ? {} : { fromSnapshot }
    return { ...from, toSnapshot, size, streamSize: streamSize + 1, dataSize, extents }
  })

const empty: RbdDiff = {
  toSnapshot: 'a',
  size: 10,
  streamSize: 30,
  dataSize: 0,
  extents: new ImageExtents(),
}

/** All that a diff tells, for comparisons. */
function plain({ extents, ...diff }: RbdDiff) {
  const runs = Array.from({ length: extents.count }, (_, i) => [
    extents.start(i),
    extents.length(i),
    extents.kind(i),
    extents.fileOffset(i),
  ])
  return { ...diff, runs }
}

test('an index tells what its stream does', () => {
  fc.assert(
    fc.property(diffs, diff => {
      expect(plain(decodeDiffIndex(encodeDiffIndex(diff)))).toEqual(plain(diff))
    }),
  )
})

test('a mangled index is refused, or stays within its stream and its image', {
  timeout: FUZZ_TIMEOUT_MS,
}, () => {
  const change = fc.record({ at: fc.nat(), value: fc.nat(255) })
  fc.assert(
    fc.property(diffs, fc.array(change, { maxLength: 4 }), fc.nat(20), (before, changes, cut) => {
      const whole = encodeDiffIndex(before)
      const bytes = whole.slice(0, whole.length - cut)
      for (const { at, value } of changes) bytes[at % bytes.length] = value
      let diff: RbdDiff
      try {
        diff = decodeDiffIndex(bytes)
      } catch (error) {
        if (!isVarveError(error, 'RBD_STREAM_INVALID')) throw error
        return
      }
      const { extents, size, streamSize } = diff
      let covered = 0
      let dataEnd = 0
      for (let i = 0; i < extents.count; i++) {
        expect(extents.start(i)).toBe(covered)
        expect(extents.length(i)).toBeGreaterThan(0)
        covered += extents.length(i)
        if (extents.kind(i) !== ExtentKind.data) continue
        expect(extents.fileOffset(i)).toBeGreaterThanOrEqual(dataEnd)
        dataEnd = extents.fileOffset(i) + extents.length(i)
        expect(dataEnd).toBeLessThan(streamSize)
      }
      expect(covered).toBe(size)
    }),
    fuzz(500),
  )
})

test('bytes that are no index are refused', () => {
  fc.assert(
    fc.property(fc.uint8Array({ maxLength: 200 }), bytes => {
      expect(() => decodeDiffIndex(bytes)).toThrow(/index of an RBD diff stream/)
    }),
  )
})

test('an index of a newer version is refused by its number', () => {
  const bytes = encodeDiffIndex(empty)
  bytes[16] = 2
  expect(() => decodeDiffIndex(bytes)).toThrow(/version 2, which only a newer Varve/)
})

test('numbers that are too large, or endless, are refused', () => {
  const bytes = encodeDiffIndex(empty)
  for (const tail of [[0xff], [0, 0x80], Array.from({ length: 20 }, () => 0xff), [0, 0x23], [0, 1], [11, 2]])
    expect(() => decodeDiffIndex(Buffer.concat([bytes, Buffer.from(tail)]))).toThrow(/leaves/)
  expect(decodeDiffIndex(Buffer.concat([bytes, Buffer.from([0, 2])])).extents.count).toBe(2)
})

test('a million ranges of a large image take less than 10 MiB', () => {
  const count = 1_000_000
  const extents = new ImageExtents()
  let offset = 100
  for (let i = 0; i < count; i++) {
    extents.append(700_000, ExtentKind.unallocated, -1)
    extents.append(65536, i % 8 === 0 ? ExtentKind.zero : ExtentKind.data, offset + 17)
    offset += 17 + (i % 8 === 0 ? 0 : 65536)
  }
  const size = count * 765_536
  const diff = { toSnapshot: 'b', size, streamSize: offset + 1, dataSize: 7 * 8192 * count, extents }
  const bytes = encodeDiffIndex(diff)
  const decoded = decodeDiffIndex(bytes)
  expect(decoded).toMatchObject({ size, streamSize: offset + 1, dataSize: 7 * 8192 * count })
  expect(decoded.extents.count).toBe(2 * count)
  expect(bytes.length).toBeLessThan(10 * 2 ** 20)
})
