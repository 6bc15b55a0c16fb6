import { FUZZ_TIMEOUT_MS, fuzz } from '@varve/testkit'
import fc from 'fast-check'
import { describe, expect, test, vi } from 'vitest'
import { restoreDisk } from '../src/restore-disk.ts'
import { MemoryTarget } from './memory-target.ts'
import { BLOCK, expectRestored, LAYERS, MEMORY, restore, stored } from './restored-in-memory.ts'
import { type LayerPlan, layerPlans } from './stored-chain.ts'

// Much work for a machine that has other work to do.
vi.setConfig({ testTimeout: 30_000 })

describe('a restore of a chain', () => {
  test('gives the disk byte for byte and fetches no stored block twice, for random chains of up to ten layers', {
    timeout: FUZZ_TIMEOUT_MS,
  }, async () => {
    await fc.assert(
      fc.asyncProperty(
        layerPlans(),
        fc.integer({ min: 1000, max: 3 * BLOCK }),
        fc.integer({ min: 1, max: 4 }),
        fc.nat({ max: 3 }),
        fc.boolean(),
        async (plans, chunkSize, downloads, ticks, direct) => {
          const backups = await stored(plans, { chunkSize, direct })
          const onWrite = async (): Promise<void> => {
            for (let tick = 0; tick < ticks; tick++) await new Promise(setImmediate)
          }
          const restored = await restore(backups, { downloads, onWrite })
          expectRestored(restored, backups.reference)
          for (const key of backups.images)
            expect(Math.max(...backups.storage.timesFetched(key, BLOCK))).toBeLessThanOrEqual(1)
        },
      ),
      fuzz(12),
    )
  })

  test('reads each image once from its beginning where the storage cannot begin a download in the middle', async () => {
    const backups = await stored(LAYERS, { rangeRead: false })
    expectRestored(await restore(backups), backups.reference)
    for (const image of backups.images) {
      const downloads = backups.storage.downloads.filter(({ key }) => key === image)
      expect(downloads.length).toBeLessThanOrEqual(2) // its tables, then all of its data
    }
  })

  test('asks for up to sixteen blocks in a row by one download', async () => {
    const runs = Array.from({ length: 512 }, (_, i): [0 | 2, number] => [i % 2 ? 0 : 2, 1])
    const backups = await stored([{ clusterSize: 8192, size: 4 << 20, runs, seed: 1 }])
    expectRestored(await restore(backups), backups.reference)
    const [image = ''] = backups.images
    const blocks = backups.storage.timesFetched(image, BLOCK).length
    const downloads = backups.storage.downloads.filter(({ key }) => key === image)
    expect(downloads).toHaveLength(1 + Math.ceil(blocks / 16)) // the first one is for the tables
  })

  test('does not download blocks of an older layer that newer ones have replaced', async () => {
    const full: LayerPlan = { clusterSize: 4096, size: 1 << 20, runs: [[2, 256]], seed: 1 }
    const most: LayerPlan = { ...full, runs: [[0, 16], [2, 224]], seed: 2 } // biome-ignore format: one line
    const backups = await stored([full, most])
    expectRestored(await restore(backups), backups.reference)
    const [times] = backups.images.map(key => backups.storage.timesFetched(key, BLOCK))
    expect(times, 'the tables are in the first block').toStrictEqual([
      1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1,
    ])
  })
})

test('lists of digests that would not fit in the memory that is left are refused before one is read', async () => {
  const backups = await stored()
  const available = vi.spyOn(process, 'availableMemory').mockReturnValue(100)
  try {
    const { error, target } = await restore(backups)
    expect(error).toMatchObject({ code: 'INVALID_ARGUMENT', context: { available: expect.any(Number) } })
    expect(target).toBeUndefined()
    expect(backups.storage.downloads).toEqual([])
  } finally {
    available.mockRestore()
  }
})

test("a restore that may use less memory than eight of the backup's blocks is refused", async () => {
  const { error, target } = await restore(await stored(), { memory: 8 * BLOCK - 1 })
  expect(error).toMatchObject({ code: 'INVALID_ARGUMENT', context: { needed: 8 * BLOCK } })
  expect(target).toBeUndefined()
})

test('progress begins at 0 of the exact number of data bytes, only grows, and ends at it', async () => {
  const backups = await stored()
  const seen: [number, number][] = []
  expectRestored(await restore(backups, { onProgress: (...bytes) => seen.push(bytes) }), backups.reference)
  const data = backups.reference.filter(byte => byte !== 0).length // the pattern has no zeros
  expect(seen[0]).toStrictEqual([0, data])
  expect(seen.at(-1)).toStrictEqual([data, data])
  expect(seen.map(([done]) => done)).toStrictEqual(seen.map(([done]) => done).toSorted((a, b) => a - b))
})

test('what is in memory keeps within the budget while the target is slow', async () => {
  const full: LayerPlan = { clusterSize: 4096, size: 8 << 20, runs: [[2, 2048]], seed: 1 }
  const odd = Array.from({ length: 1024 }, (_, i): [0 | 2, number] => [i % 2 ? 0 : 2, 2])
  for (const chunkSize of [BLOCK, 10_000]) {
    const backups = await stored([full, { ...full, runs: odd, seed: 2 }], { chunkSize })
    const { storage, images } = backups
    const sent = (): number =>
      storage.downloads.reduce((sum, { key, sent }) => sum + (images.includes(key) ? sent : 0), 0)
    const buffers = new Set<ArrayBufferLike>()
    let release = (): void => undefined
    const released = new Promise<void>(resolve => {
      release = resolve
    })
    const target = Promise.withResolvers<MemoryTarget>()
    const done = restoreDisk({
      storage,
      chain: backups.chain,
      disk: 'vda',
      memory: MEMORY,
      async createTarget(merged) {
        const made = new MemoryTarget(merged, () => released)
        const write = made.write.bind(made)
        made.write = (offset, data, options) => {
          buffers.add(data.buffer)
          return write(offset, data, options)
        }
        target.resolve(made)
        return made
      },
    })
    await target.promise
    await quiet(sent)
    expect(buffers.size).toBeLessThanOrEqual(MEMORY / BLOCK)
    expect(buffers.size).toBeGreaterThan(8) // it does not idle either
    expect(sent()).toBeLessThanOrEqual(MEMORY + 6 * chunkSize) // a stream holds a chunk or two of its own
    release()
    await done
    expect((await target.promise).disk.equals(backups.reference)).toBe(true)
  }
})

/** Waits until nothing moves any more. */
async function quiet(moved: () => number): Promise<void> {
  for (let still = 0, last = -1; still < 200; still++) {
    await new Promise(setImmediate)
    if (moved() !== last) still = 0
    last = moved()
  }
}
