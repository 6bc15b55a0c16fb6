import { open } from 'node:fs/promises'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { ExtentKind, ExtentList, openImage, planImage } from '../src/index.ts'
import { expectClean, inFolder, qemuImg, writeMetadata } from './qemu-img.ts'

const { unallocated, data } = ExtentKind
const KIB = 1024
const MIB = 1024 * KIB
const TIB = 1024 * 1024 * MIB

/** What `qemu-img map` says of a full image, as kinds: its holes read as zeros. */
async function mapped(
  path: string,
): Promise<{ start: number; length: number; offset: number | undefined }[]> {
  const entries: { start: number; length: number; data: boolean; zero: boolean; offset?: number }[] =
    JSON.parse(await qemuImg('map', '--output=json', path))
  return entries.map(({ start, length, offset }) => ({ start, length, offset }))
}

/** Runs of data and of nothing by turns. */
function alternating(
  size: number,
  runs: readonly (readonly [dataLength: number, gap: number])[],
): ExtentList {
  const list = new ExtentList()
  for (const [dataLength, gap] of runs) {
    list.append(dataLength, data)
    list.append(gap, unallocated)
  }
  list.append(size - list.size, unallocated)
  return list
}

test.each([
  {
    name: '16 TiB with little data',
    clusterSize: 64 * KIB,
    extents: alternating(16 * TIB, [
      [64 * KIB, TIB],
      [MIB, 7 * TIB],
      [640 * KIB, 512 * MIB],
    ]),
  },
  {
    name: '64 TiB with clusters of 2 MiB',
    clusterSize: 2 * MIB,
    extents: alternating(64 * TIB, [
      [512 * 1024 * MIB + 2 * MIB, 60 * TIB],
      [4 * MIB, 2 * MIB],
    ]),
  },
  {
    name: 'a data area of 4 GiB in clusters of 4 KiB, past the first cluster of the refcount table',
    clusterSize: 4 * KIB,
    extents: alternating(8 * TIB, [
      [4096 * MIB - 4 * KIB, 4 * KIB],
      [12 * KIB, 8 * KIB],
    ]),
  },
])(
  'qemu-img finds $name clean, and every run of it where the layout says',
  async ({ clusterSize, extents }) => {
    await inFolder(async folder => {
      const layout = planImage(extents, { clusterSize })
      const path = join(folder, 'vda.qcow2')
      await writeMetadata(layout, path)
      await expectClean(path, layout.fileSize)
      const runs = Array.from({ length: extents.count }, (_, i) => ({
        start: extents.start(i),
        length: extents.length(i),
        offset: layout.fileOffset(extents.start(i)),
      }))
      expect(await mapped(path)).toEqual(runs)
    })
  },
)

test('qemu-img finds a disk of 1 TiB with a million extents clean', async () => {
  const pairs = Array.from({ length: 500_000 }, (_, i) => [64 * KIB * (1 + (i % 8)), 64 * KIB * 20] as const)
  const extents = alternating(TIB, pairs)
  expect(extents.count).toBe(1_000_000)
  await inFolder(async folder => {
    const layout = planImage(extents)
    const path = join(folder, 'vda.qcow2')
    await writeMetadata(layout, path)
    await expectClean(path, layout.fileSize)
    await using file = await open(path)
    const image = await openImage({
      size: layout.fileSize,
      read: async (offset, into) => void (await file.read(into, 0, into.length, offset)),
    })
    expect(image.extents.count).toBe(1_000_000)
    for (let i = 0; i < extents.count; i++) {
      if (image.extents.start(i) !== extents.start(i) || image.extents.kind(i) !== extents.kind(i))
        expect.fail(`extent ${i} differs`)
    }
  })
})
