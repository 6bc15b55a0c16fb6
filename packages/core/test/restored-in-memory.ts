import { expect } from 'vitest'
import { type RestoreDiskOptions, restoreDisk } from '../src/restore-disk.ts'
import { MemoryStorage, type MemoryStorageOptions } from './memory-storage.ts'
import { MemoryTarget } from './memory-target.ts'
import { type LayerPlan, type StoredChain, storeChain } from './stored-chain.ts'

export const BLOCK = 64 * 1024
export const MEMORY: number = 16 * BLOCK

/** Three layers of a 1 MiB disk: most of it data in the full one, then changes with zeros among them. */
export const LAYERS: LayerPlan[] = [
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

/** A chain in memory. */
export async function stored(
  layers: readonly LayerPlan[] = LAYERS,
  options: MemoryStorageOptions = {},
): Promise<StoredChain & { storage: MemoryStorage }> {
  const storage = new MemoryStorage(options)
  return { storage, ...(await storeChain(storage, layers, { blockSize: BLOCK })) }
}

export interface Restored {
  target: MemoryTarget | undefined
  error: unknown
}

/** Restores `vda` to memory; never throws. */
export async function restore(
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

export function expectRestored({ target, error }: Restored, reference: Buffer): void {
  if (error) throw error
  expect(target?.state).toBe('finished')
  expect(target?.complete).toBe(true)
  expect(target?.disk.equals(reference)).toBe(true)
}

/** Flips a bit of the byte at `at`, counted round and round the object. */
export function flipBit(storage: MemoryStorage, key: string, at: number): void {
  const object = storage.objects.get(key)
  if (object) object.writeUInt8(object.readUInt8(at % object.length) ^ (1 << (at % 8)), at % object.length)
}
