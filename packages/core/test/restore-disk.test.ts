import fc from 'fast-check'
import { describe, expect, test, vi } from 'vitest'
import { BlockDigester } from '../src/digest.ts'
import { VarveError } from '../src/errors.ts'
import { type RestoreDiskOptions, restoreDisk } from '../src/restore-disk.ts'
import { MemoryStorage, type MemoryStorageOptions } from './memory-storage.ts'
import { MemoryTarget } from './memory-target.ts'
import { type LayerPlan, layerPlans, type StoredChain, storeChain } from './stored-chain.ts'

const BLOCK = 64 * 1024
const MEMORY = 16 * BLOCK

// Much work for a machine that has other work to do.
vi.setConfig({ testTimeout: 30_000 })

/** Three layers of a 1 MiB disk: most of it data in the full one, then changes with zeros among them. */
const LAYERS: LayerPlan[] = [
  { clusterSize: 4096, size: 1 << 20, runs: [[2, 200]], seed: 1 },
  {
    clusterSize: 8192,
    size: 1 << 20,
    runs: [
      [0, 10],
      [2, 12],
      [1, 20],
    ],
    seed: 2,
  },
  {
    clusterSize: 4096,
    size: 1 << 20,
    runs: [
      [2, 3],
      [0, 40],
      [2, 5],
      [1, 3],
    ],
    seed: 3,
  },
]

async function stored(
  layers: readonly LayerPlan[] = LAYERS,
  options: MemoryStorageOptions = {},
): Promise<StoredChain & { storage: MemoryStorage }> {
  const storage = new MemoryStorage(options)
  return { storage, ...(await storeChain(storage, layers, { blockSize: BLOCK })) }
}

interface Restored {
  target: MemoryTarget | undefined
  error: unknown
}

/** Restores `vda` to memory; never throws. */
async function restore(
  { storage, chain }: { storage: MemoryStorage; chain: StoredChain['chain'] },
  options: Partial<RestoreDiskOptions> & { onWrite?: ConstructorParameters<typeof MemoryTarget>[1] } = {},
): Promise<Restored> {
  const { onWrite, ...rest } = options
  const restored: Restored = { target: undefined, error: undefined }
  try {
    await restoreDisk({
      storage,
      chain,
      disk: 'vda',
      memory: MEMORY,
      retry: { backoffMs: 0 },
      createTarget: async merged => {
        restored.target = new MemoryTarget(merged, onWrite)
        return restored.target
      },
      ...rest,
    })
  } catch (error) {
    restored.error = error
  }
  return restored
}

function expectRestored({ target, error }: Restored, reference: Buffer): void {
  if (error) throw error
  expect(target?.state).toBe('finished')
  expect(target?.complete).toBe(true)
  expect(target?.disk.equals(reference)).toBe(true)
}

describe('a restore of a chain', () => {
  test('gives the disk byte for byte and fetches no stored block twice, for random chains of up to ten layers', async () => {
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
      { numRuns: 30 },
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

describe('a restore from a storage that fails', () => {
  test('refuses an object with one flipped bit, unless that block is not needed', async () => {
    await fc.assert(
      fc.asyncProperty(layerPlans(4), fc.nat(), fc.nat(), async (plans, pick, at) => {
        const backups = await stored(plans)
        const { storage, reference } = backups
        const keys = [...storage.objects.keys()]
        const key = keys[pick % keys.length] ?? ''
        flipBit(storage, key, at)
        const block = Math.floor((at % sizeOf(storage, key)) / BLOCK)
        const restored = await restore(backups)
        if (key.endsWith('.qcow2') && storage.timesFetched(key, BLOCK)[block] === 0)
          return expectRestored(restored, reference)
        const where = key.endsWith('.qcow2') ? { key, block, offset: block * BLOCK } : { key }
        expect(restored.error).toMatchObject({ code: 'DIGEST_MISMATCH', context: where })
        expect(restored.target?.state ?? 'aborted').toBe('aborted')
      }),
      { numRuns: 30 },
    )
  })

  test('refuses an object that is shorter or longer than recorded before the target is made', async () => {
    await fc.assert(
      fc.asyncProperty(
        layerPlans(4),
        fc.nat(),
        fc.integer({ min: -100_000, max: 100 }),
        async (plans, pick, by) => {
          const backups = await stored(plans)
          const { storage } = backups
          const keys = [...storage.objects.keys()]
          const key = keys[pick % keys.length] ?? ''
          const object = storage.objects.get(key) ?? Buffer.alloc(0)
          const size = Math.max(0, object.length + (by || 1))
          storage.objects.set(key, Buffer.concat([object, Buffer.alloc(100)]).subarray(0, size))
          const { error, target } = await restore(backups)
          expect(error).toMatchObject({ code: 'SIZE_MISMATCH', context: { key } })
          expect(target).toBeUndefined()
        },
      ),
      { numRuns: 30 },
    )
  })

  test('names the object that is gone, before the target is made', async () => {
    for (const gone of ['vda.qcow2', 'vda.blake3']) {
      const backups = await stored()
      const key = `${backups.chain[1]?.folder}/${gone}`
      backups.storage.objects.delete(key)
      const { error, target } = await restore(backups)
      expect(error).toMatchObject({ code: 'OBJECT_NOT_FOUND', context: { key } })
      expect(target).toBeUndefined()
    }
  })

  test('goes on with a download from the block where it was cut, wherever and however that was', async () => {
    await fc.assert(
      fc.asyncProperty(
        layerPlans(5),
        fc.array(fc.tuple(fc.nat(40), fc.constantFrom('retryable', 'socket', 'end')), { maxLength: 12 }),
        fc.boolean(),
        async (plans, cuts, direct) => {
          const left = cuts.toSorted(([a], [b]) => a - b)
          let chunks = 0
          const backups = await stored(plans, {
            chunkSize: 10_000,
            direct,
            fault(key) {
              if (!key.endsWith('.qcow2') || chunks++ < (left[0]?.[0] ?? Number.POSITIVE_INFINITY)) return
              const kind = left.shift()?.[1]
              if (kind === 'end') return 'end'
              if (kind === 'socket') throw Object.assign(new Error('read ECONNRESET'), { code: 'ECONNRESET' })
              throw new VarveError('STORAGE_UNREACHABLE', 'gone', { retryable: true })
            },
          })
          const restored = await restore(backups, { retry: { backoffMs: 0, attempts: cuts.length + 1 } })
          expectRestored(restored, backups.reference)
        },
      ),
      { numRuns: 30 },
    )
  })

  test('gives up after the bounded number of tries, and at once where trying again is of no use', async () => {
    let asked = 0
    const failing = (retryable: boolean): MemoryStorageOptions => ({
      chunkSize: 10_000, // it fails in the middle of a block
      fault(key, offset) {
        if (!key.endsWith('00-000-abcdef/vda.qcow2') || offset < 100_000) return
        asked++
        throw new VarveError('STORAGE_UNREACHABLE', 'gone', { retryable })
      },
    })
    const { error, target } = await restore(await stored(LAYERS, failing(true)), { downloads: 1 })
    expect(error).toMatchObject({ code: 'STORAGE_UNREACHABLE' })
    expect({ asked, state: target?.state }).toStrictEqual({ asked: 5, state: 'aborted' })
    asked = 0
    expect(await restore(await stored(LAYERS, failing(false)), { downloads: 1 })).toMatchObject({
      error: { code: 'STORAGE_UNREACHABLE' },
    })
    expect(asked).toBe(1)
  })

  test('takes a size that ends within a sector for the next whole one, as the image does', async () => {
    const backups = await stored()
    const chain = (less: number) =>
      backups.chain.map(({ folder, manifest }) => {
        const disks = manifest.disks.map(disk => ({ ...disk, virtualSize: disk.virtualSize - less }))
        return { folder, manifest: { ...manifest, disks } }
      })
    expectRestored(await restore({ ...backups, chain: chain(511) }), backups.reference)
    const { error } = await restore({ ...backups, chain: chain(512) })
    expect(error).toMatchObject({ code: 'IMAGE_INVALID' })
  })

  test('refuses an image that is whole but not the one of the manifest', async () => {
    const backups = await stored()
    const other = await stored(LAYERS.map(layer => ({ ...layer, size: layer.size + 512 })))
    const { manifest, folder } = other.chain[1] ?? {}
    const [disk] = manifest?.disks ?? []
    const [recorded] = backups.chain[1]?.manifest.disks ?? []
    if (!disk || !recorded) throw new Error('no disk')
    const { digest, storedSize } = disk
    const { storage } = backups
    for (const file of ['vda.qcow2', 'vda.blake3'])
      storage.objects.set(
        `${folder}/${file}`,
        other.storage.objects.get(`${folder}/${file}`) ?? Buffer.alloc(0),
      )
    const forge = (fields: object): StoredChain['chain'] =>
      backups.chain.map((backup, index) =>
        index === 1
          ? { ...backup, manifest: { ...backup.manifest, disks: [{ ...recorded, ...fields }] } }
          : backup,
      )
    const forged = await restore({ storage, chain: forge({ digest, storedSize }) })
    expect(forged.error).toMatchObject({ code: 'IMAGE_INVALID', context: { size: (1 << 20) + 512 } })
    expect(forged.target).toBeUndefined()
    const text = await restore({ storage, chain: forge(await storeText(storage, `${folder}/vda`)) })
    expect(text.error).toMatchObject({ code: 'IMAGE_INVALID', cause: { code: 'QCOW2_INVALID' } })
  })
})

describe('a restore that is given up', () => {
  test('ends with the reason of the signal, and aborts the target when nothing is in flight', async () => {
    await fc.assert(
      fc.asyncProperty(fc.nat(90), async after => {
        const backups = await stored(LAYERS, { chunkSize: 10_000 })
        const controller = new AbortController()
        const reason = new Error('the operator left')
        let calls = 0
        const tick = async (): Promise<void> => {
          if (calls++ === after) controller.abort(reason)
          await new Promise(setImmediate)
        }
        const options = backups.storage
        const get = options.get.bind(options)
        options.get = async (key, getOptions) => {
          await tick()
          return get(key, getOptions)
        }
        const { error, target } = await restore(backups, { signal: controller.signal, onWrite: tick })
        if (target?.state === 'finished') return // it was done before it could be given up
        expect(controller.signal.aborted).toBe(true)
        expect(error).toMatchObject({ code: 'ABORTED', cause: reason })
        expect(target?.state ?? 'aborted').toBe('aborted')
      }),
      { numRuns: 30 },
    )
  })

  test('by the target ends with the error of the first write that failed', async () => {
    const { error, target } = await restore(await stored(), {
      async onWrite(offset, options) {
        if (offset > 300_000) throw new VarveError('TARGET_FULL', 'full')
        await new Promise<void>(resolve =>
          options?.signal?.addEventListener('abort', () => setImmediate(resolve), { once: true }),
        )
      },
    })
    expect(error).toMatchObject({ code: 'TARGET_FULL' })
    expect(target?.state).toBe('aborted')
  })

  test('by the listener of progress ends with its error', async () => {
    const view = new Error('the view is broken')
    const { error, target } = await restore(await stored(), {
      onProgress(done) {
        if (done > 0) throw view
      },
    })
    expect(error).toBe(view)
    expect(target?.state).toBe('aborted')
  })

  test('by an abort while the target is made is told as one', async () => {
    const controller = new AbortController()
    const { error } = await restore(await stored(), {
      signal: controller.signal,
      async createTarget() {
        controller.abort()
        throw new Error('the request was given up')
      },
    })
    expect(error).toMatchObject({ code: 'ABORTED' })
  })

  test('tells of a target that could not be removed, with what made it fail', async () => {
    const backups = await stored()
    flipBit(backups.storage, backups.images[0] ?? '', 800_000)
    const { error } = await restore(backups, {
      async createTarget(merged) {
        const target = new MemoryTarget(merged)
        target.abort = () => Promise.reject(new Error('read-only file system'))
        return target
      },
    })
    expect(error).toMatchObject({
      code: 'DIGEST_MISMATCH',
      message: expect.stringMatching(/another digest.*read-only file system/s),
    })
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

function sizeOf(storage: MemoryStorage, key: string): number {
  return storage.objects.get(key)?.length ?? 0
}

/** Flips a bit of the byte at `at`, counted round and round the object. */
function flipBit(storage: MemoryStorage, key: string, at: number): void {
  const object = storage.objects.get(key)
  if (object) object.writeUInt8(object.readUInt8(at % object.length) ^ (1 << (at % 8)), at % object.length)
}

/** Stores a text where an image should be, and its digests; returns what a manifest would record. */
async function storeText(storage: MemoryStorage, path: string): Promise<object> {
  const text = Buffer.from('no image at all\n'.repeat(1000))
  const digester = new BlockDigester(BLOCK)
  digester.update(text)
  const { size, digest, blocks } = digester.finish()
  storage.objects.set(`${path}.qcow2`, text)
  storage.objects.set(`${path}.blake3`, Buffer.from(blocks))
  return { digest, storedSize: size }
}
