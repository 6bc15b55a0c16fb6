import fc from 'fast-check'
import { expect, test } from 'vitest'
import { formatRate, formatSize, parseSize } from '../src/size-text.ts'

test.each([
  [0, '0 B'],
  [1, '1 B'],
  [1023, '1023 B'],
  [1024, '1.0 KiB'],
  [1536, '1.5 KiB'],
  [99.9 * 1024, '99.9 KiB'],
  [100 * 1024, '100 KiB'],
  [1024 ** 2 - 1, '1.0 MiB'],
  [3 * 1024 ** 3, '3.0 GiB'],
  [350 * 1024 ** 2, '350 MiB'],
  [16 * 1024 ** 4, '16.0 TiB'],
])('%i bytes are printed as %s', (bytes, text) => {
  expect(formatSize(bytes)).toBe(text)
})

test('a rate is a size a second', () => {
  expect(formatRate(350 * 1024 ** 2)).toBe('350 MiB/s')
})

test('a printed size is within five percent of the bytes and at most eight characters long', () => {
  const units = { B: 1, KiB: 1024, MiB: 1024 ** 2, GiB: 1024 ** 3, TiB: 1024 ** 4, PiB: 1024 ** 5 }
  fc.assert(
    fc.property(fc.maxSafeNat(), bytes => {
      const [value, unit] = formatSize(bytes).split(' ')
      const read = Number(value) * (Object.entries(units).find(([name]) => name === unit)?.[1] ?? Number.NaN)
      expect(Math.abs(read - bytes)).toBeLessThanOrEqual(bytes * 0.05)
      expect(formatSize(bytes).length).toBeLessThanOrEqual(8)
    }),
  )
})

test.each([
  ['1', 1],
  ['512', 512],
  ['512B', 512],
  ['64K', 65_536],
  ['64k', 65_536],
  ['50M', 50 * 1024 ** 2],
  ['50MiB', 50 * 1024 ** 2],
  ['1.5G', 1.5 * 1024 ** 3],
  ['2T', 2 * 1024 ** 4],
])('%s is a size', (text, bytes) => {
  expect(parseSize(text)).toBe(bytes)
})

test.each(['', '0', '-1', 'M', '50MB', '5 M', '1e6', '0x10', '9999999T', '1.2.3', 'NaN', '٣M'])(
  '%j is no size, and the message gives an example',
  text => {
    expect(() => parseSize(text)).toThrow(/such as 50M/)
  },
)
