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

test('a chain has at least one backup', () => {
  expect(() => diskLayers([], 'vda')).toThrow(
    expect.objectContaining({ code: 'INVALID_ARGUMENT', message: 'A chain has at least one backup.' }),
  )
})

test('the layers of each disk are images of that disk', () => {
  const both = chain.map(backup => {
    const disks = backup.manifest.disks.flatMap(disk => {
      const { backing } = disk
      const other = {
        name: 'vdb',
        image: 'vdb.qcow2',
        ...(backing && { backing: backing.replace('vda', 'vdb') }),
      }
      return [{ ...disk, ...other }, disk]
    })
    return { ...backup, manifest: { ...backup.manifest, disks } }
  })
  for (const name of ['vda', 'vdb'])
    expect(diskLayers(both, name).map(({ disk }) => disk.image)).toStrictEqual(Array(4).fill(`${name}.qcow2`))
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
  const others = withDisks(3, disk => ['vdb', 'vdc'].map(name => ({ ...disk, name })))
  expect(() => diskLayers(others, 'vda')).toThrow(
    expect.objectContaining({
      message: `Backup ${layerId(3)} has no disk vda. It has vdb, vdc.`,
      context: { backup: layerId(3), disk: 'vda', disks: ['vdb', 'vdc'] },
    }),
  )
})

test('a layer that is missing breaks the chain, and is named', () => {
  const broken = (missing: number) =>
    expect.objectContaining({
      code: 'CHAIN_BROKEN',
      context: { backup: layerId(3), disk: 'vda', missing: layerId(missing) },
      message: expect.stringContaining(
        `the image of vda in ${layerId(missing + 1)} rests on backup ${layerId(missing)}, which has none`,
      ),
    })
  for (const missing of [0, 1, 2]) {
    const withoutDisk = withDisks(missing, () => [])
    expect(() => diskLayers(withoutDisk, 'vda')).toThrow(broken(missing))
    expect(() => diskLayers(chain.toSpliced(missing, 1), 'vda')).toThrow(broken(missing))
    expect(() => diskLayers(chain.slice(missing + 1), 'vda')).toThrow(broken(missing))
  }
})

test('an image that is recorded to rest on another one than the next is refused', () => {
  const refuses = (changed: StoredBackup[], of: number, says: string, backing?: string, expected?: string) =>
    expect(() => diskLayers(changed, 'vda')).toThrow(
      expect.objectContaining({
        code: 'MANIFEST_INVALID',
        message: expect.stringContaining(`says that vda.qcow2 rests on ${says}. Restore another`),
        context: { backup: layerId(of), disk: 'vda', backing, expected },
      }),
    )
  const right = `../${layerId(1)}/vda.qcow2`
  for (const backing of ['../../other/vda.qcow2', `../${layerId(0)}/vda.qcow2`, '/etc/shadow']) {
    const changed = withDisks(2, disk => [{ ...disk, backing }])
    refuses(changed, 2, `${backing} instead of ${right}`, backing, right)
  }
  const onNothing = withDisks(2, ({ backing, ...disk }) => [disk])
  refuses(onNothing, 2, `nothing instead of ${right}`, undefined, right)
  const fullOnSomething = withDisks(0, disk => [{ ...disk, backing: '../x/vda.qcow2' }])
  refuses(fullOnSomething, 0, '../x/vda.qcow2 instead of nothing', '../x/vda.qcow2')
})
