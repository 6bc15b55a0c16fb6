import { mkdir, readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { fuzz } from '@varve/testkit'
import fc from 'fast-check'
import { expect, test } from 'vitest'
import { ComposedImage, ExtentKind, ExtentList, mergeLayers, openImage, planImage } from '../src/index.ts'
import {
  extentsOf,
  type LayerPlan,
  layerPlans,
  memoryFile,
  memoryGuest,
  nextDisk,
  readMerged,
} from './chain-model.ts'
import { expectClean, expectSame, inFolder, qemuImg, writeMetadata } from './qemu-img.ts'

const { unallocated, zero, data } = ExtentKind
const KIB = 1024
const MIB = 1024 * KIB
/** Writes every layer of a chain, and after each asks qemu-img whether it is clean and what it reads as. */
async function checkChain(plans: readonly LayerPlan[], folder: string): Promise<void> {
  let disk: Buffer | undefined
  const files: Buffer[] = []
  const raw = join(folder, 'reference.raw')
  for (const [index, plan] of plans.entries()) {
    disk = nextDisk(disk, plan)
    const layout = planImage(extentsOf(plan), {
      clusterSize: plan.clusterSize,
      ...(index > 0 ? { backing: { name: `../${index - 1}/vda.qcow2`, format: 'qcow2' } } : {}),
    })
    const image = new ComposedImage(layout, memoryGuest(disk.subarray(0, plan.size)))
    const file = Buffer.concat(await image.stream({ chunkSize: 64 * KIB }).toArray())
    expect(file.length).toBe(layout.fileSize)
    files.unshift(file)
    const path = join(folder, String(index), 'vda.qcow2')
    await mkdir(join(folder, String(index)))
    await writeFile(path, file)
    await writeFile(raw, disk)
    await expectClean(path, layout.fileSize)
    await expectSame(raw, path, 'qcow2')
  }
  const images = await Promise.all(files.map(file => openImage(memoryFile(file))))
  await writeFile(join(folder, 'merged.raw'), readMerged(mergeLayers(images), files))
  await expectSame(raw, join(folder, 'merged.raw'), 'raw')
}

test('qemu-img finds every layer of a random chain clean and reads from it what the guest had', async () => {
  await fc.assert(
    fc.asyncProperty(fc.array(layerPlans(21, 16 * MIB), { minLength: 1, maxLength: 10 }), plans =>
      inFolder(folder => checkChain(plans, folder)),
    ),
    fuzz(5),
  )
})

test('a chain of ten layers of different cluster sizes and disk sizes reads as the guest had it', async () => {
  const plans = Array.from({ length: 10 }, (_, i): LayerPlan => {
    const clusterSize = 2 ** (12 + ((i * 7) % 10))
    const sizes = [8 * MIB, 8 * MIB + 512, 3 * MIB + 1, 20 * MIB - 4096, 5_000_001]
    const kinds = [data, unallocated, zero, unallocated, data, zero] as const
    const runs = Array.from({ length: 60 }, (_, j) => [kinds[(i + j * 5) % 6] ?? data, 1 + (j % 3)] as const)
    return { clusterSize, size: sizes[i % 5] ?? 0, runs, seed: i }
  })
  await inFolder(folder => checkChain(plans, folder))
})

test('zeros that the guest wrote hide the data of the layer below', async () => {
  const full: LayerPlan = { clusterSize: 64 * KIB, size: MIB, runs: [[data, 16]], seed: 1 }
  const increment: LayerPlan = {
    clusterSize: 64 * KIB,
    size: MIB,
    runs: [
      [unallocated, 3],
      [zero, 5],
    ],
    seed: 2,
  }
  expect(nextDisk(nextDisk(undefined, full), increment).subarray(192 * KIB, 512 * KIB)).toEqual(
    Buffer.alloc(320 * KIB),
  )
  await inFolder(folder => checkChain([full, increment], folder))
})

const SINGLE_IMAGES: readonly (LayerPlan & { name: string })[] = [
  { name: 'nothing at all', clusterSize: 64 * KIB, size: 0, runs: [], seed: 3 },
  { name: 'one byte', clusterSize: 64 * KIB, size: 1, runs: [[data, 1]], seed: 3 },
  { name: 'a disk of zeros', clusterSize: 4 * KIB, size: MIB, runs: [[zero, 256]], seed: 3 },
  { name: 'one full L2 table', clusterSize: 4 * KIB, size: 2 * MIB, runs: [[data, 512]], seed: 3 },
  { name: 'a byte over an L2 table', clusterSize: 4 * KIB, size: 2 * MIB + 1, runs: [[data, 513]], seed: 3 },
  { name: 'clusters of 2 MiB', clusterSize: 2 * MIB, size: 4 * MIB + 513, runs: [[data, 3]], seed: 3 },
]

test.each(SINGLE_IMAGES)('an image of $name is clean and reads as the guest had it', async plan =>
  inFolder(folder => checkChain([plan], folder)),
)

test.each([2039, 2040, 2041, 2042])(
  'with %i clusters of data around the end of the first refcount block an image is clean',
  async clusters => {
    // header, refcount table, a block, L1 table and four L2 tables come with them: 2040 fill the block
    const plan: LayerPlan = { clusterSize: 4 * KIB, size: 8 * MIB, runs: [[data, clusters]], seed: 4 }
    await inFolder(folder => checkChain([plan], folder))
  },
)

test('qemu-img reads the backing file name and format that were given, up to 1023 bytes', async () => {
  await inFolder(async folder => {
    const full: LayerPlan = { clusterSize: 4 * KIB, size: 4 * KIB, runs: [[data, 1]], seed: 5 }
    const disk = nextDisk(undefined, full)
    const name = `${'./'.repeat(508)}vda.raw`
    expect(name.length).toBe(1023)
    await writeFile(join(folder, 'vda.raw'), disk)
    const extents = new ExtentList()
    extents.append(4 * KIB, unallocated)
    const layout = planImage(extents, { clusterSize: 4 * KIB, backing: { name, format: 'raw' } })
    const path = join(folder, 'increment.qcow2')
    await writeMetadata(layout, path)
    await expectClean(path, layout.fileSize)
    const info = JSON.parse(await qemuImg('info', '--output=json', path))
    expect(info).toMatchObject({
      'virtual-size': 4 * KIB,
      'cluster-size': 4 * KIB,
      'backing-filename': name,
      'backing-filename-format': 'raw',
      'format-specific': { data: { compat: '1.1', 'refcount-bits': 16, corrupt: false } },
    })
    await qemuImg('convert', '-O', 'raw', path, join(folder, 'converted.raw'))
    expect((await readFile(join(folder, 'converted.raw'))).equals(disk)).toBe(true)
  })
})

test('what qemu-img writes in order is read too', async () => {
  await inFolder(async folder => {
    const disk = nextDisk(undefined, {
      clusterSize: 4 * KIB,
      size: MIB,
      runs: [
        [data, 100],
        [zero, 28],
        [data, 9],
      ],
      seed: 6,
    })
    await writeFile(join(folder, 'vda.raw'), disk)
    const path = join(folder, 'vda.qcow2')
    const raw = join(folder, 'vda.raw')
    await qemuImg('convert', '-f', 'raw', '-O', 'qcow2', '-o', 'cluster_size=4k', raw, path)
    const file = await readFile(path)
    const padded = Buffer.concat([file, Buffer.alloc((4 * KIB - (file.length % (4 * KIB))) % (4 * KIB))])
    const image = await openImage(memoryFile(padded))
    expect(readMerged(mergeLayers([image]), [padded]).equals(disk)).toBe(true)
  })
})
