import fc from 'fast-check'
import { expect, test } from 'vitest'
import { ExtentKind, type LayeredExtents, mergeLayers, openImage, type Qcow2Image } from '../src/index.ts'
import {
  BACKING,
  compose,
  type LayerPlan,
  layerPlans,
  memoryFile,
  nextDisk,
  readMerged,
} from './chain-model.ts'

const { unallocated, zero, data } = ExtentKind
const KIB = 1024

interface Chain {
  /** Newest first, as the merge wants them. */
  readonly images: Qcow2Image[]
  readonly files: Buffer[]
  /** What the guest had at the end. */
  readonly disk: Buffer
}

/** Composes and opens a chain of plans, the full one first. */
async function chainOf(plans: readonly LayerPlan[]): Promise<Chain> {
  let disk: Buffer | undefined
  const files: Buffer[] = []
  for (const plan of plans) {
    disk = nextDisk(disk, plan)
    const { file } = await compose(plan, disk, files.length > 0 ? BACKING : undefined)
    files.unshift(file)
  }
  const images = await Promise.all(files.map(file => openImage(memoryFile(file))))
  return { images, files, disk: disk ?? Buffer.alloc(0) }
}

function runsOf(
  merged: LayeredExtents,
): { start: number; length: number; layer: number; fileOffset: number }[] {
  return Array.from({ length: merged.count }, (_, i) => ({
    start: merged.start(i),
    length: merged.length(i),
    layer: merged.layer(i),
    fileOffset: merged.fileOffset(i),
  }))
}

/** A plan of 64 KiB in clusters of 4 KiB. */
function plan(seed: number, ...runs: [ExtentKind, number][]): LayerPlan {
  return { clusterSize: 4 * KIB, size: 64 * KIB, runs, seed }
}

test('a merged chain of up to ten layers of any sizes reads as the guest had it, in the fewest runs', async () => {
  await fc.assert(
    fc.asyncProperty(fc.array(layerPlans(14, 2 ** 18), { minLength: 1, maxLength: 10 }), async plans => {
      const { images, files, disk } = await chainOf(plans)
      const merged = mergeLayers(images)
      expect(merged.size).toBe(disk.length)
      expect(readMerged(merged, files).equals(disk)).toBe(true)
      let last: ReturnType<typeof runsOf>[number] | undefined
      for (const run of runsOf(merged)) {
        expect([run.start, run.length > 0]).toEqual([last ? last.start + last.length : 0, true])
        const continues =
          last?.layer === run.layer && (run.layer === -1 || last.fileOffset + last.length === run.fileOffset)
        expect(continues).toBe(false)
        if (run.layer === -1) expect(run.fileOffset).toBe(-1)
        last = run
      }
      expect((last?.start ?? 0) + (last?.length ?? 0)).toBe(disk.length)
    }),
    { numRuns: 100 },
  )
}, 30_000)

test('the newest layer that has a cluster gives it', async () => {
  const { images } = await chainOf([
    plan(1, [data, 16]),
    plan(2, [unallocated, 2], [data, 4], [unallocated, 10]),
    plan(3, [data, 1], [unallocated, 3], [data, 1], [zero, 3], [unallocated, 8]),
  ])
  const first = images.map(image =>
    Array.from({ length: image.extents.count }, (_, i) => image.extents.fileOffset(i)),
  )
  const newest = first[0]?.find(offset => offset >= 0) ?? 0
  const middle = first[1]?.find(offset => offset >= 0) ?? 0
  const full = first[2]?.[0] ?? 0
  const at = (cluster: number): number => cluster * 4 * KIB
  expect(runsOf(mergeLayers(images))).toEqual([
    { start: 0, length: at(1), layer: 0, fileOffset: newest },
    { start: at(1), length: at(1), layer: 2, fileOffset: full + at(1) },
    { start: at(2), length: at(2), layer: 1, fileOffset: middle },
    { start: at(4), length: at(1), layer: 0, fileOffset: newest + at(1) },
    { start: at(5), length: at(3), layer: -1, fileOffset: -1 },
    { start: at(8), length: at(8), layer: 2, fileOffset: full + at(8) },
  ])
})

test('what a smaller layer cut off stays away when a larger one follows', async () => {
  const { images, disk, files } = await chainOf([
    { clusterSize: 4 * KIB, size: 64 * KIB, runs: [[data, 16]], seed: 1 },
    { clusterSize: 8 * KIB, size: 20 * KIB, runs: [], seed: 2 },
    {
      clusterSize: 4 * KIB,
      size: 96 * KIB,
      runs: [
        [unallocated, 20],
        [data, 1],
      ],
      seed: 3,
    },
  ])
  const merged = mergeLayers(images)
  expect(runsOf(merged).map(run => [run.start / KIB, run.length / KIB, run.layer])).toEqual([
    [0, 20, 2],
    [20, 60, -1],
    [80, 4, 0],
    [84, 12, -1],
  ])
  expect(readMerged(merged, files).equals(disk)).toBe(true)
})

test('runs of different cluster sizes meet inside a cluster', async () => {
  const { images, disk, files } = await chainOf([
    { clusterSize: 64 * KIB, size: 256 * KIB, runs: [[data, 4]], seed: 1 },
    {
      clusterSize: 4 * KIB,
      size: 256 * KIB,
      runs: [
        [unallocated, 17],
        [data, 1],
        [unallocated, 3],
        [zero, 1],
      ],
      seed: 2,
    },
  ])
  const merged = mergeLayers(images)
  expect(runsOf(merged).map(run => [run.start / KIB, run.length / KIB, run.layer])).toEqual([
    [0, 68, 1],
    [68, 4, 0],
    [72, 12, 1],
    [84, 4, -1],
    [88, 168, 1],
  ])
  expect(readMerged(merged, files).equals(disk)).toBe(true)
})

test('a chain of thousands of runs grows as needed', async () => {
  const size = 4096 * 4 * KIB
  const full: LayerPlan = { clusterSize: 4 * KIB, size, runs: [[data, 4096]], seed: 1 }
  const newest: LayerPlan = {
    clusterSize: 4 * KIB,
    size,
    runs: Array.from({ length: 4096 }, (_, i) => [i % 2 === 0 ? data : unallocated, 1] as const),
    seed: 2,
  }
  const { images, disk, files } = await chainOf([full, newest])
  const merged = mergeLayers(images)
  expect(merged.count).toBe(4096)
  expect(readMerged(merged, files).equals(disk)).toBe(true)
})

test('zeros of several layers, and what no layer has, are one run', async () => {
  const { images } = await chainOf([
    plan(1, [unallocated, 8], [data, 8]),
    plan(2, [unallocated, 8], [zero, 4]),
    plan(3, [unallocated, 12], [zero, 4]),
  ])
  expect(runsOf(mergeLayers(images))).toEqual([{ start: 0, length: 64 * KIB, layer: -1, fileOffset: -1 }])
})

test('a chain of one full image is that image', async () => {
  const { images, files, disk } = await chainOf([plan(1, [data, 3], [zero, 1], [data, 12])])
  const merged = mergeLayers(images)
  expect(merged.count).toBe(3)
  expect(readMerged(merged, files).equals(disk)).toBe(true)
})

test('an image of no disk merges to nothing', async () => {
  const { images } = await chainOf([{ clusterSize: 4096, size: 0, runs: [], seed: 1 }])
  const merged = mergeLayers(images)
  expect([merged.size, merged.count]).toEqual([0, 0])
})

test('a chain ends with its full image, and has no other', async () => {
  const { images } = await chainOf([plan(1, [data, 1]), plan(2, [data, 1]), plan(3, [data, 1])])
  const [newest, middle, full] = images
  if (!newest || !middle || !full) throw new Error('the chain has three layers')
  const refusal = (message: RegExp, context: object) =>
    expect.objectContaining({ code: 'QCOW2_ARGUMENT', message: expect.stringMatching(message), context })
  expect(() => mergeLayers([])).toThrow(refusal(/at least one/, {}))
  expect(() => mergeLayers([newest, middle])).toThrow(refusal(/full one is missing/, { layers: 2 }))
  expect(() => mergeLayers([newest, full, middle])).toThrow(
    refusal(/^Layer 1 has no backing file/, { layers: 3 }),
  )
  expect(() => mergeLayers([full, full])).toThrow(refusal(/^Layer 0 has no backing file/, { layers: 2 }))
})

test.each([-1, 3, 0.5])('there is no run %d in a chain of three', async index => {
  const { images } = await chainOf([plan(1, [data, 3], [zero, 1], [data, 12])])
  const merged = mergeLayers(images)
  for (const read of [
    () => merged.start(index),
    () => merged.length(index),
    () => merged.layer(index),
    () => merged.fileOffset(index),
  ])
    expect(read).toThrow(
      expect.objectContaining({
        code: 'QCOW2_ARGUMENT',
        message: `There is no extent ${index} in a chain of 3.`,
        context: { index },
      }),
    )
})
