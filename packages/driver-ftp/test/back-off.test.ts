import { expect, test } from 'vitest'
import { backOffMs } from '../src/back-off.ts'

test('the wait before the next try grows, to ten seconds and no further', () => {
  expect([1, 2, 3, 4, 5].map(backOffMs)).toEqual([100, 300, 900, 2700, 8100])
  for (const failures of [6, 10, 18, 100]) expect(backOffMs(failures)).toBe(10_000)
})
