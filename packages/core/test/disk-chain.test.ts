import { beforeAll, expect, test } from 'vitest'
import type { StoredBackup } from '../src/backups.ts'
import { diskLayers } from '../src/disk-chain.ts'
import type { ManifestDisk } from '../src/manifest.ts'
import { MemoryStorage } from './memory-storage.ts'
import { layerId, storeChain } from './stored-chain.ts'

let chain: StoredBackup[] = []

beforeAll(async () => {
  const plan = { clusterSize: 4096, size: 8192, runs: [], seed: 0 }
  chain = (await storeChain(new MemoryStorage(), [plan, plan, plan, plan])).chain
})

/** The chain with other disks in one backup. */
function withDisks(index: number, change: (disk: ManifestDisk) => ManifestDisk[]): StoredBackup[] {
  return chain.map((backup, at) =>
    at === index
      ? { ...backup, manifest: { ...backup.manifest, disks: backup.manifest.disks.flatMap(change) } }
      : backup,
  )
}

function ids(layers: readonly { backup: StoredBackup }[]): string[] {
  return layers.map(({ backup }) => backup.manifest.id)
}

test('the layers of a disk are the newest first and a full image last', () => {
  expect(ids(diskLayers(chain, 'vda'))).toStrictEqual([3, 2, 1, 0].map(layerId))
  expect(ids(diskLayers(chain.slice(0, 2), 'vda'))).toStrictEqual([1, 0].map(layerId))
})

test('a full image of the disk in an incremental backup ends its layers', () => {
  const full = withDisks(2, ({ backing, ...disk }) => [{ ...disk, kind: 'full' }])
  expect(ids(diskLayers(full, 'vda'))).toStrictEqual([3, 2].map(layerId))
})

test('a disk that the newest backup does not have is not found, whatever older ones have', () => {
  const without = withDisks(3, () => [])
  expect(() => diskLayers(without, 'vda')).toThrow(
    expect.objectContaining({
      code: 'DISK_NOT_FOUND',
      context: { backup: layerId(3), disk: 'vda', disks: [] },
    }),
  )
})

test('a layer that is missing breaks the chain, and is named', () => {
  const broken = expect.objectContaining({
    code: 'CHAIN_BROKEN',
    context: expect.objectContaining({ missing: layerId(1) }),
  })
  expect(() =>
    diskLayers(
      withDisks(1, () => []),
      'vda',
    ),
  ).toThrow(broken)
  expect(() => diskLayers(chain.toSpliced(1, 1), 'vda')).toThrow(broken)
  expect(() => diskLayers(chain.slice(2), 'vda')).toThrow(broken)
})

test('an image that is recorded to rest on another one than the next is refused', () => {
  for (const backing of ['../../other/vda.qcow2', `../${layerId(0)}/vda.qcow2`, '/etc/shadow']) {
    const changed = withDisks(2, disk => [{ ...disk, backing }])
    expect(() => diskLayers(changed, 'vda')).toThrow(expect.objectContaining({ code: 'MANIFEST_INVALID' }))
  }
  const onNothing = withDisks(2, ({ backing, ...disk }) => [disk])
  expect(() => diskLayers(onNothing, 'vda')).toThrow(expect.objectContaining({ code: 'MANIFEST_INVALID' }))
  const fullOnSomething = withDisks(0, disk => [{ ...disk, backing: '../x/vda.qcow2' }])
  expect(() => diskLayers(fullOnSomething, 'vda')).toThrow(
    expect.objectContaining({ code: 'MANIFEST_INVALID' }),
  )
})
