import fc from 'fast-check'
import { expect, test } from 'vitest'
import {
  largestBufferedPart,
  largestObject,
  largestStream,
  type PartLimits,
  plannedPartSize,
  streamPartSize,
} from '../src/part-plan.ts'

const MIB = 1024 * 1024
const GIB = 1024 * MIB
const TIB = 1024 * GIB
const limits = fc.record({
  maxParts: fc.integer({ min: 1, max: 10_000 }),
  partSize: fc.integer({ min: 5 * MIB, max: 5 * GIB }),
  equalParts: fc.boolean(),
})

test('an object of 5 TiB fits into 10,000 parts', () => {
  const partSize = plannedPartSize(5 * TIB, { maxParts: 10_000 }, 16 * MIB)
  expect(Math.ceil((5 * TIB) / partSize)).toBeLessThanOrEqual(10_000)
  expect(partSize).toBe(525 * MIB)
})

test('an object beyond 48.8 GiB, where parts of 5 MiB end, fits', () => {
  const partSize = plannedPartSize(49 * GIB, { maxParts: 10_000 }, 5 * MIB)
  expect(Math.ceil((49 * GIB) / partSize)).toBeLessThanOrEqual(10_000)
})

test('any object that is allowed is planned within the rules of S3', () => {
  fc.assert(
    fc.property(limits, fc.double({ min: 0, max: 1, noNaN: true }), (limits, share) => {
      const size = Math.floor(largestObject(limits) * share)
      const partSize = plannedPartSize(size, limits, limits.partSize)
      expect(Number.isSafeInteger(partSize)).toBe(true)
      expect(partSize).toBeGreaterThanOrEqual(limits.partSize)
      expect(partSize).toBeLessThanOrEqual(5 * GIB)
      expect(Math.ceil(size / partSize)).toBeLessThanOrEqual(limits.maxParts)
    }),
    { examples: [[{ maxParts: 1, partSize: 5 * MIB, equalParts: false }, 1]] },
  )
})

test('parts of a stream grow, fit into memory, and are of one size where they must be', () => {
  fc.assert(
    fc.property(limits, fc.integer({ min: 1, max: 9999 }), (limits, number) => {
      const size = streamPartSize(number, limits, undefined)
      const next = streamPartSize(number + 1, limits, undefined)
      expect(size).toBeGreaterThanOrEqual(5 * MIB)
      expect(next).toBeGreaterThanOrEqual(size)
      expect(next).toBeLessThanOrEqual(largestBufferedPart(limits))
      if (limits.equalParts) expect(next).toBe(size)
    }),
  )
})

test.each<[Partial<PartLimits>, number]>([
  // parts of 8, 16, 32 and 64 MiB, a twentieth of all each, and then of the largest size
  [{}, 500 * (8 + 16 + 32 + 64) + 8000 * 96],
  [{ maxParts: 1000 }, 50 * (8 + 16 + 32 + 64) + 800 * 96],
  [{ equalParts: true }, 10_000 * 32],
  [{ equalParts: true, maxParts: 1000 }, 1000 * 32],
  [{ partSize: 256 * MIB }, 500 * (8 + 16 + 32 + 64) + 8000 * 256],
  [{ partSize: 256 * MIB, maxParts: 1000 }, 50 * (8 + 16 + 32 + 64) + 800 * 256],
  [{ partSize: 256 * MIB, equalParts: true }, 10_000 * 256],
  [{ partSize: 256 * MIB, equalParts: true, maxParts: 1000 }, 1000 * 256],
])('a stream of unknown size with %j may have %d MiB', (options, size) => {
  const limits = { maxParts: 10_000, partSize: 16 * MIB, equalParts: false, ...options }
  expect(largestStream(limits, undefined)).toBe(size * MIB)
})

test('a stream of known size may have as many parts of the largest size as there may be', () => {
  const usual = { maxParts: 10_000, partSize: 16 * MIB, equalParts: false }
  expect(largestStream(usual, 5 * TIB)).toBe(10_000 * 96 * MIB)
  expect(largestStream({ ...usual, partSize: 256 * MIB }, 5 * TIB)).toBe(10_000 * 256 * MIB)
})
