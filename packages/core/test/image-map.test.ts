import fc from 'fast-check'
import { expect, test } from 'vitest'
import { ImageMap } from '../src/image-map.ts'

test('every byte of a disk is found where the map was told that it is, and as far as that goes', () => {
  const runs = fc.array(
    fc.record({ gap: fc.nat(3), length: fc.integer({ min: 1, max: 4 }), offset: fc.nat(1000) }),
    {
      maxLength: 200, // over the room that a map begins with
    },
  )
  fc.assert(
    fc.property(runs, list => {
      const map = new ImageMap()
      const bytes: (readonly [offset: number | undefined, left: number])[] = []
      for (const { gap, length, offset } of list) {
        for (let left = gap; left > 0; left--) bytes.push([undefined, left])
        map.append(bytes.length, length, offset)
        for (let i = 0; i < length; i++) bytes.push([offset + i, length - i])
      }
      expect(map.count).toBe(list.length)
      bytes.forEach(([fileOffset, length], at) => {
        expect(map.at(at)).toEqual({ fileOffset, length })
      })
      expect(map.at(bytes.length)).toEqual({ fileOffset: undefined, length: Number.POSITIVE_INFINITY })
    }),
  )
})

test('runs that are empty or overlap are refused', () => {
  const map = new ImageMap()
  map.append(10, 5, 0)
  expect(() => map.append(14, 5, 100)).toThrow(RangeError)
  expect(() => map.append(15, 0, 100)).toThrow(RangeError)
  map.append(15, 5, 100)
})
