import { FUZZ_TIMEOUT_MS, fuzz } from '@varve/testkit'
import fc from 'fast-check'
import { expect, test } from 'vitest'
import { type DataMap, DataMapWriter, decodeDataMap } from '../src/data-map.ts'
import { isVarveError } from '../src/errors.ts'
import { RangeList } from '../src/range-list.ts'

function mapOf(size: number, ranges: readonly (readonly [start: number, end: number])[]): DataMap {
  const data = new RangeList()
  for (const [start, end] of ranges) data.append(start, end)
  return { size, data }
}

/** The bytes of a map, told in extents as a server does: equal neighbours now and then. */
function encodeDataMap({ size, data }: DataMap, most = 2 ** 30): Uint8Array {
  const writer = new DataMapWriter(size, most)
  let end = 0
  for (let i = 0; i < data.count; end = data.end(i), i++) {
    if (data.start(i) > end) writer.append(end, data.start(i), 3)
    const middle = Math.floor((data.start(i) + data.end(i)) / 2)
    if (middle > data.start(i)) writer.append(data.start(i), middle, i % 2)
    writer.append(Math.max(middle, data.start(i)), data.end(i), 0)
  }
  if (end < size) writer.append(end, size, 2)
  return writer.finish() ?? Buffer.alloc(0)
}

function rangesOf({ data }: DataMap): [number, number][] {
  return Array.from({ length: data.count }, (_, i) => [data.start(i), data.end(i)])
}

/** Gaps and lengths, most of them small, some beyond 32 bits. */
const part = fc.oneof(
  { weight: 5, arbitrary: fc.integer({ min: 1, max: 300 }) },
  fc.integer({ min: 1, max: 2 ** 44 }),
)
const ranges = fc.array(fc.tuple(part, part), { maxLength: 60 }).map(parts => {
  let at = 0
  return parts.map(([gap, length]): [number, number] => {
    const start = at + gap
    at = start + length
    return [start, at]
  })
})

test('a map that was written down is read as it was', () => {
  fc.assert(
    fc.property(ranges, fc.nat(1000), (ranges, rest) => {
      const map = mapOf((ranges.at(-1)?.[1] ?? 0) + rest, ranges)
      const read = decodeDataMap(encodeDataMap(map))
      expect(read.size).toBe(map.size)
      expect(rangesOf(read)).toEqual(ranges)
    }),
  )
})

test('bytes that are no map are refused, and nothing else comes of them', {
  timeout: FUZZ_TIMEOUT_MS,
}, () => {
  const damaged = fc
    .tuple(ranges, fc.nat(), fc.uint8Array({ maxLength: 12 }), fc.nat(30))
    .map(([ranges, at, bytes, cut]) => {
      const encoded = Buffer.from(encodeDataMap(mapOf((ranges.at(-1)?.[1] ?? 0) + 7, ranges)))
      encoded.set(bytes.subarray(0, encoded.length - (at % encoded.length)), at % encoded.length)
      return encoded.subarray(0, encoded.length - Math.min(cut, encoded.length))
    })
  fc.assert(
    fc.property(fc.oneof(fc.uint8Array({ maxLength: 200 }), damaged), bytes => {
      try {
        const { size, data } = decodeDataMap(bytes)
        for (let i = 0, end = 0; i < data.count; end = data.end(i), i++) {
          expect(data.start(i)).toBeGreaterThanOrEqual(end)
          expect(data.end(i)).toBeGreaterThan(data.start(i))
          expect(data.end(i)).toBeLessThanOrEqual(size)
        }
        expect(data.count).toBeLessThanOrEqual(bytes.length)
      } catch (error) {
        if (!isVarveError(error, 'IMAGE_INVALID')) throw error
      }
    }),
    fuzz(400),
  )
})

test.each([
  ['its first bytes are others', (bytes: Buffer) => bytes.write('V'), 'does not begin as one'],
  ['it ends within its header', (bytes: Buffer) => bytes.subarray(0, 23), 'does not begin as one'],
  ['its size is no number', (bytes: Buffer) => bytes.writeUInt8(0x20, 22), 'its size is too large'],
  ['a range is empty', (bytes: Buffer) => bytes.writeUInt8(0, 25), 'a range leaves the disk'],
  ['a range is longer than the disk', (bytes: Buffer) => bytes.writeUInt8(9, 25), 'a range leaves the disk'],
  ['a range ends within a number', (bytes: Buffer) => bytes.writeUInt8(0x81, 25), 'a range leaves the disk'],
] as const)('a map is refused where %s', (_what, damage, why) => {
  const bytes = Buffer.from(encodeDataMap(mapOf(10, [[2, 10]])))
  expect(decodeDataMap(bytes).data.count).toBe(1)
  const result = damage(bytes)
  const damaged = typeof result === 'number' ? bytes : result
  expect(() => decodeDataMap(damaged)).toThrow(why)
})

test('a map of a later version is told from a damaged one', () => {
  const bytes = Buffer.from(encodeDataMap(mapOf(10, [])))
  bytes[15] = 2
  expect(() => decodeDataMap(bytes)).toThrow(/only a newer Varve/)
})

test('a million ranges take less than 8 MiB', () => {
  const ranges = Array.from({ length: 1_000_000 }, (_, i): [number, number] => [
    i * 2 ** 20,
    i * 2 ** 20 + 65_536,
  ])
  const bytes = encodeDataMap(mapOf(2 ** 40, ranges))
  expect(bytes.byteLength).toBeLessThan(8 * 2 ** 20)
  expect(decodeDataMap(bytes).data.count).toBe(1_000_000)
})

test('a map that would be too large is none', () => {
  const map = mapOf(2 ** 40, [
    [0, 512],
    [1024, 2048],
  ])
  const bytes = encodeDataMap(map)
  expect(encodeDataMap(map, bytes.length)).toEqual(bytes)
  expect(encodeDataMap(map, bytes.length - 1).length).toBe(0)
})
