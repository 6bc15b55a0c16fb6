import { mkdir, mkdtemp, rename, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { expect, test } from 'vitest'
import { deviceIdentity, diskMark, type FoundBitmap, joinTwins, ownerOf, sealOf } from '../src/bitmap-twin.ts'

const found = (name: string, dirty: number | undefined, change: Partial<FoundBitmap> = {}): FoundBitmap => ({
  name,
  granularity: 65_536,
  enabled: true,
  inconsistent: false,
  ...(dirty !== undefined && { dirty }),
  ...change,
})

test.each([
  ['as much as its twin', found('varve-1', 5), found('varve-1-twin-f1', 5), 'agrees'],
  ['more than its twin', found('varve-1', 6), found('varve-1-twin-f1', 5), 'agrees'],
  ['less than its twin', found('varve-1', 4), found('varve-1-twin-f1', 5), 'differs'],
  ['no twin', found('varve-1', 5), found('varve-2-twin-f1', 5), 'missing'],
  ['the twin of another file', found('varve-1', 5), found('varve-1-twin-f2', 5), 'foreign'],
  ['a twin that is stopped', found('varve-1', 5), found('varve-1-twin-f1', 5, { enabled: false }), 'differs'],
  [
    'a twin that was not stored',
    found('varve-1', 5),
    found('varve-1-twin-f1', 5, { inconsistent: true }),
    'differs',
  ],
  [
    'a twin of another granularity',
    found('varve-1', 5),
    found('varve-1-twin-f1', 5, { granularity: 512 }),
    'differs',
  ],
  ['no count', found('varve-1', undefined), found('varve-1-twin-f1', 5), 'differs'],
  ['a twin without a count', found('varve-1', 5), found('varve-1-twin-f1', undefined), 'differs'],
] as const)('a bitmap that has %s', (_what, bitmap, twin, verdict) => {
  for (const bitmaps of [
    [bitmap, twin],
    [twin, bitmap],
  ])
    expect(joinTwins(bitmaps, 'f1').find(({ name }) => name === 'varve-1')).toMatchObject({ twin: verdict })
})

test('a twin is told of under the name of its bitmap, also where it is alone', () => {
  const both = joinTwins([found('varve-1', 5), found('varve-1-twin-f1', 5)], 'f1')
  expect(both.map(({ name }) => name)).toEqual(['varve-1'])
  expect(both.flatMap(({ names }) => names)).toEqual(['varve-1', 'varve-1-twin-f1'])
  const alone = joinTwins([found('varve-1-twin-f1', 5), found('varve-1-twin-f2', 5)], 'f1')
  expect(alone).toMatchObject([{ name: 'varve-1', twin: 'alone' }])
  expect(alone.flatMap(({ names }) => names)).toEqual(['varve-1-twin-f1', 'varve-1-twin-f2'])
  const foreign = joinTwins([found('mine-twin-f1', 5)], 'f1')
  expect(foreign).toMatchObject([{ name: 'mine-twin-f1', twin: 'missing' }])
  expect(foreign.flatMap(({ names }) => names)).toEqual(['mine-twin-f1'])
})

test.each([
  ['has bits', 7, false, 'agrees'],
  ['was cleared', 0, false, 'differs'],
  ['cannot be counted', undefined, false, 'agrees'],
  ['records', 7, true, 'differs'],
] as const)('a bitmap like its twin whose seal %s', (_what, dirty, enabled, twin) => {
  const bitmaps = [
    found('varve-1', 0),
    found('varve-1-twin-f1', 0),
    found('varve-1-seal', dirty, { enabled }),
  ]
  expect(joinTwins(bitmaps, 'f1')).toMatchObject([{ twin, names: bitmaps.map(({ name }) => name) }])
})

test('a seal takes its bits from the bitmap of Varve that has the most', () => {
  const none = [found('varve-2', 0), found('varve-2-twin-f1', undefined)]
  expect(sealOf('varve-2', none)).toBeUndefined()
  const others = [
    found('varve-1', 3),
    found('mine', 9),
    found('varve-0', 9, { inconsistent: true }),
    found('varve-3', 9, { granularity: 512 }),
  ]
  const seal = { name: 'varve-2-seal', from: 'varve-1', granularity: 65_536 }
  expect(sealOf('varve-2', [...none, ...others])).toEqual(seal)
  expect(sealOf('varve-2', others)).toBeUndefined()
  expect(sealOf('varve-2', [...none, ...others, found(seal.name, 3)])).toBeUndefined()
  expect(sealOf('varve-2', [...none, ...others, found('varve-1-seal', 8)])).toMatchObject({
    name: seal.name,
    from: 'varve-1-seal',
  })
  expect(ownerOf(seal.name)).toBe('varve-2')
  expect(ownerOf('mine-seal')).toBe('mine-seal')
})

test("a copy's own twin counts, whatever others came along", () => {
  const bitmaps = [found('varve-1', 4), found('varve-1-twin-f2', 9), found('varve-1-twin-f1', 4)]
  expect(joinTwins(bitmaps, 'f1')).toMatchObject([{ twin: 'agrees', names: bitmaps.map(({ name }) => name) }])
  expect(joinTwins(bitmaps, 'f2')).toMatchObject([{ twin: 'differs' }])
})

test('a disk keeps its mark when its file is written to and moved, and another file in its place has another', async () => {
  const folder = await mkdtemp(join(tmpdir(), 'varve-mark-'))
  const [path, moved] = [join(folder, 'a'), join(folder, 'b')]
  await writeFile(path, 'x')
  const mark = await diskMark('vda', path)
  await writeFile(path, 'other')
  expect(await diskMark('vda', path)).toBe(mark)
  await rename(path, moved)
  expect(await diskMark('vda', moved)).toBe(mark)
  expect(await diskMark('vdb', moved)).not.toBe(mark)
  await rm(moved) // its number is free again
  await writeFile(moved, 'x')
  expect(await diskMark('vda', moved)).not.toBe(mark)
  await rm(folder, { recursive: true })
})

test('a block device is told by what the kernel knows of it, and not by its number', async () => {
  const folder = await mkdtemp(join(tmpdir(), 'varve-sysfs-'))
  const device = async (name: string, file: string, text: string) => {
    const path = join(folder, name, file)
    await mkdir(dirname(path), { recursive: true })
    await writeFile(path, text)
    return deviceIdentity(join(folder, name))
  }
  const volume = await device('254:0', 'dm/uuid', 'LVM-one\n')
  expect(await device('254:1', 'dm/uuid', 'LVM-two\n')).not.toBe(volume)
  expect(await device('254:2', 'dm/uuid', 'LVM-one\n')).toBe(volume)
  const disk = await device('8:0', 'device/wwid', 'naa.50\n')
  expect(await device('259:0', 'wwid', 'naa.50\n')).toBe(disk)
  expect(await device('8:1', 'device/wwid', 'naa.51\n')).not.toBe(disk)
  // A mapping without a uuid has an empty one.
  const unnamed = await device('254:3', 'dm/uuid', '\n')
  expect(new Set([volume, disk, unnamed]).size).toBe(3)
  expect(await deviceIdentity(join(folder, 'none'))).toBe(unnamed)
  await rm(folder, { recursive: true })
})
