import { expect, test } from 'vitest'
import { type FoundBitmap, joinTwins, namesOnDisk } from '../src/bitmap-twin.ts'

const found = (name: string, dirty: number | undefined, change: Partial<FoundBitmap> = {}): FoundBitmap => ({
  name,
  granularity: 65_536,
  enabled: true,
  inconsistent: false,
  ...(dirty !== undefined && { dirty }),
  ...change,
})

test.each([
  ['as much as its twin', found('varve-1', 5), found('varve-1-twin', 5), 'agrees'],
  ['more than its twin', found('varve-1', 6), found('varve-1-twin', 5), 'agrees'],
  ['less than its twin', found('varve-1', 4), found('varve-1-twin', 5), 'differs'],
  ['no twin', found('varve-1', 5), found('varve-2-twin', 5), 'missing'],
  ['a twin that is stopped', found('varve-1', 5), found('varve-1-twin', 5, { enabled: false }), 'differs'],
  [
    'a twin that was not stored',
    found('varve-1', 5),
    found('varve-1-twin', 5, { inconsistent: true }),
    'differs',
  ],
  [
    'a twin of another granularity',
    found('varve-1', 5),
    found('varve-1-twin', 5, { granularity: 512 }),
    'differs',
  ],
  ['no count', found('varve-1', undefined), found('varve-1-twin', 5), 'differs'],
  ['a twin without a count', found('varve-1', 5), found('varve-1-twin', undefined), 'differs'],
] as const)('a bitmap that has %s', (_what, bitmap, twin, verdict) => {
  for (const bitmaps of [
    [bitmap, twin],
    [twin, bitmap],
  ])
    expect(joinTwins(bitmaps).find(({ name }) => name === 'varve-1')).toMatchObject({ twin: verdict })
})

test('a twin is told of under the name of its bitmap, also where it is alone', () => {
  const both = joinTwins([found('varve-1', 5), found('varve-1-twin', 5)])
  expect(both.map(({ name }) => name)).toEqual(['varve-1'])
  expect(both.flatMap(namesOnDisk)).toEqual(['varve-1', 'varve-1-twin'])
  const alone = joinTwins([found('varve-1-twin', 5)])
  expect(alone).toMatchObject([{ name: 'varve-1', twin: 'alone' }])
  expect(alone.flatMap(namesOnDisk)).toEqual(['varve-1-twin'])
  const foreign = joinTwins([found('mine-twin', 5)])
  expect(foreign).toMatchObject([{ name: 'mine-twin', twin: 'missing' }])
  expect(foreign.flatMap(namesOnDisk)).toEqual(['mine-twin'])
})
