import fc from 'fast-check'
import { expect, test } from 'vitest'
import { RangeList } from '../src/range-list.ts'

test('ranges are kept as they come, and those that touch are one', () => {
  const parts = fc.array(fc.tuple(fc.nat(3), fc.integer({ min: 1, max: 5 })), { maxLength: 200 })
  fc.assert(
    fc.property(parts, parts => {
      const list = new RangeList()
      const model: [number, number][] = []
      let end = 0
      for (const [gap, length] of parts) {
        const start = end + gap
        end = start + length
        list.append(start, end)
        const last = model.at(-1)
        if (last && last[1] === start) last[1] = end
        else model.push([start, end])
      }
      expect(Array.from({ length: list.count }, (_, i) => [list.start(i), list.end(i)])).toEqual(model)
    }),
  )
})

test.each([
  [5, 20],
  [9, 20],
  [12, 12],
  [12, 11],
])('a range from %i to %i is refused behind one that ends at 10, and is not kept', (start, end) => {
  const list = new RangeList()
  list.append(4, 10)
  expect(() => list.append(start, end)).toThrow(`from ${start} to ${end}, where the last one ends at 10`)
  expect([list.count, list.start(0), list.end(0)]).toEqual([1, 4, 10])
})
