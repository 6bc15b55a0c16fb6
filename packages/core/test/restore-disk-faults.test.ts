import { FUZZ_TIMEOUT_MS, fuzz } from '@varve/testkit'
import fc from 'fast-check'
import { describe, expect, test, vi } from 'vitest'
import { BlockDigester } from '../src/digest.ts'
import { VarveError } from '../src/errors.ts'
import type { MemoryStorage, MemoryStorageOptions } from './memory-storage.ts'
import { BLOCK, expectRestored, flipBit, LAYERS, restore, stored } from './restored-in-memory.ts'
import { layerPlans, type StoredChain } from './stored-chain.ts'

// Much work for a machine that has other work to do.
vi.setConfig({ testTimeout: 30_000 })

describe('a restore from a storage that fails', () => {
  test('refuses an object with one flipped bit, unless that block is not needed', {
    timeout: FUZZ_TIMEOUT_MS,
  }, async () => {
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
      fuzz(12),
    )
  })

  test('refuses an object that is shorter or longer than recorded before the target is made', {
    timeout: FUZZ_TIMEOUT_MS,
  }, async () => {
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
      fuzz(12),
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

  test('goes on with a download from the block where it was cut, wherever and however that was', {
    timeout: FUZZ_TIMEOUT_MS,
  }, async () => {
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
      fuzz(12),
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

function sizeOf(storage: MemoryStorage, key: string): number {
  return storage.objects.get(key)?.length ?? 0
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
