import { execFile } from 'node:child_process'
import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { promisify } from 'node:util'
import fc from 'fast-check'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { ComposedImage, type ExtentKind, mergeLayers, openImage, planImage } from '../src/index.ts'
import { extentsOf, type LayerPlan, memoryFile, memoryGuest, nextDisk, readMerged } from './chain-model.ts'

const run = promisify(execFile)
let folder = ''

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'varve-qcow2-'))
})

afterAll(async () => {
  await rm(folder, { recursive: true, force: true })
})

const layer = fc
  .record({
    bits: fc.integer({ min: 12, max: 21 }),
    clusters: fc.integer({ min: 0, max: 40 }),
    cut: fc.oneof(fc.constant(0), fc.integer({ min: 0, max: 2 ** 21 })),
    runs: fc.array(fc.tuple(fc.constantFrom<ExtentKind>(0, 1, 2), fc.integer({ min: 1, max: 8 })), {
      maxLength: 12,
    }),
    seed: fc.nat(),
  })
  .map(({ bits, clusters, cut, runs, seed }): LayerPlan => {
    const clusterSize = 2 ** bits
    const size = Math.max(0, Math.min(clusters, 2 ** 25 / clusterSize) * clusterSize - (cut % clusterSize))
    return { clusterSize, size, runs, seed }
  })

/** Writes every layer of a chain, and after each asks qemu-img whether it is clean and what it reads as. */
async function checkChain(plans: readonly LayerPlan[], place: string): Promise<void> {
  let disk: Buffer | undefined
  const files: Buffer[] = []
  for (const [index, plan] of plans.entries()) {
    disk = nextDisk(disk, plan)
    const layout = planImage(extentsOf(plan), {
      clusterSize: plan.clusterSize,
      ...(index > 0 ? { backing: { name: `../${index - 1}/vda.qcow2`, format: 'qcow2' } } : {}),
    })
    const file = Buffer.concat(
      await new ComposedImage(layout, memoryGuest(disk.subarray(0, plan.size)))
        .stream({ chunkSize: 65536 })
        .toArray(),
    )
    expect(file.length).toBe(layout.fileSize)
    files.unshift(file)
    const path = join(place, String(index), 'vda.qcow2')
    const raw = join(place, 'reference.raw')
    await mkdir(join(place, String(index)))
    await writeFile(path, file)
    await writeFile(raw, disk)
    const check = JSON.parse((await run('qemu-img', ['check', '--output=json', path])).stdout)
    expect(check).toMatchObject({ 'check-errors': 0, 'image-end-offset': file.length })
    expect([check.leaks, check.corruptions]).toEqual([undefined, undefined])
    const compared = await run('qemu-img', ['compare', '-f', 'raw', '-F', 'qcow2', raw, path])
    expect(compared.stdout).toBe('Images are identical.\n') // and no warning of different sizes
  }
  const images = await Promise.all(files.map(file => openImage(memoryFile(file))))
  const merged = readMerged(mergeLayers(images), files)
  expect(disk && merged.equals(disk)).toBe(true)
}

test('qemu-img finds every layer of a random chain clean and reads from it what the guest had', async () => {
  let runs = 0
  await fc.assert(
    fc.asyncProperty(fc.array(layer, { minLength: 1, maxLength: 10 }), async plans => {
      const place = join(folder, String(runs++))
      await mkdir(place)
      try {
        await checkChain(plans, place)
      } finally {
        await rm(place, { recursive: true })
      }
    }),
    { numRuns: 25 },
  )
})
