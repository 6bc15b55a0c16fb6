import { expect, test } from 'vitest'
import { ExtentKind, ExtentList } from '../src/index.ts'
import { extentsAsArray } from './chain-model.ts'

const { unallocated, zero, data } = ExtentKind

test('an empty list covers nothing', () => {
  const list = new ExtentList()
  expect([list.count, list.size]).toEqual([0, 0])
})

test('runs follow each other without gaps', () => {
  const list = new ExtentList()
  list.append(100, data)
  list.append(50, zero)
  list.append(7, unallocated)
  expect(extentsAsArray(list)).toEqual([
    { start: 0, length: 100, kind: data },
    { start: 100, length: 50, kind: zero },
    { start: 150, length: 7, kind: unallocated },
  ])
  expect(list.size).toBe(157)
})

test('a run of the same kind as the last is joined with it', () => {
  const list = new ExtentList()
  list.append(1, unallocated)
  list.append(2, unallocated)
  list.append(3, data)
  list.append(4, data)
  expect(extentsAsArray(list)).toEqual([
    { start: 0, length: 3, kind: unallocated },
    { start: 3, length: 7, kind: data },
  ])
})

test('no bytes are no run, and do not part two runs of one kind', () => {
  const list = new ExtentList()
  list.append(0, data)
  expect(list.count).toBe(0)
  list.append(5, zero)
  list.append(0, data)
  list.append(5, zero)
  expect(extentsAsArray(list)).toEqual([{ start: 0, length: 10, kind: zero }])
})

test.each([0, 1, 2, 16, 17])('a list with room for %i runs grows as needed', capacity => {
  const list = new ExtentList(capacity)
  for (let i = 0; i < 1000; i++) list.append(i + 1, i % 2 === 0 ? data : zero)
  expect([list.count, list.size]).toEqual([1000, 500_500])
  expect(extentsAsArray(list)).toEqual(
    Array.from({ length: 1000 }, (_, i) => ({
      start: (i * (i + 1)) / 2,
      length: i + 1,
      kind: i % 2 === 0 ? data : zero,
    })),
  )
})

test.each([-1, 0.5, Number.NaN, Number.POSITIVE_INFINITY, 2 ** 53])(
  '%d is not the length of a run',
  length => {
    const list = new ExtentList()
    expect(() => list.append(length, data)).toThrow(
      expect.objectContaining({
        code: 'QCOW2_ARGUMENT',
        message: `Not the length of an extent: ${length}.`,
        context: { length },
      }),
    )
    expect([list.count, list.size]).toEqual([0, 0])
  },
)

test('a list ends at 2^53 - 1 bytes', () => {
  const list = new ExtentList()
  list.append(Number.MAX_SAFE_INTEGER - 1, data)
  list.append(1, zero)
  expect(list.size).toBe(Number.MAX_SAFE_INTEGER)
  expect(() => list.append(1, zero)).toThrow(expect.objectContaining({ code: 'QCOW2_ARGUMENT' }))
  expect(list.size).toBe(Number.MAX_SAFE_INTEGER)
})

test.each([-1, 2, 0.5])('there is no run %d in a list of two', index => {
  const list = new ExtentList()
  list.append(1, data)
  list.append(1, zero)
  for (const read of [() => list.start(index), () => list.length(index), () => list.kind(index)])
    expect(read).toThrow(
      expect.objectContaining({
        code: 'QCOW2_ARGUMENT',
        message: `There is no extent ${index} in a list of 2.`,
        context: { index },
      }),
    )
})

test('a list has at most 2^24 runs, and a longer last one', () => {
  const list = new ExtentList(2 ** 24)
  for (let i = 0; i < 2 ** 24; i++) list.append(1, i % 2 === 0 ? zero : data)
  list.append(1, data)
  expect(() => list.append(1, zero)).toThrow(
    expect.objectContaining({
      code: 'QCOW2_FRAGMENTED',
      message: expect.stringMatching(/more than 16777216 runs.*larger cluster size/),
      context: { runs: 2 ** 24, covered: 2 ** 24 + 1 },
    }),
  )
  expect(list.size).toBe(2 ** 24 + 1)
})
