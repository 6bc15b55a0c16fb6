import { expect, test, vi } from 'vitest'
import { readCatalog } from '../src/backups.ts'
import { chainForRestore } from '../src/restore-chain.ts'
import { dayId, storeFake } from './fake-backup.ts'
import { MemoryStorage } from './memory-storage.ts'

/** Three backups of two disks; `vda` is full again in the second. */
async function stored() {
  const storage = new MemoryStorage()
  const chain = dayId(1)
  const full = await storeFake(storage, { id: chain, disks: ['vda', 'vdb'] })
  const middle = await storeFake(storage, {
    ...{ id: dayId(2), chain, parent: dayId(1) },
    ...{ disks: ['vdb'], fullDisks: ['vda'] },
  })
  const newest = await storeFake(storage, { id: dayId(3), chain, parent: dayId(2), disks: ['vda', 'vdb'] })
  return { storage, full, middle, newest }
}

async function check(
  { storage, newest }: Awaited<ReturnType<typeof stored>>,
  disk: string,
  definition = false,
) {
  const catalog = await readCatalog(storage, 'web-1/')
  const chain = chainForRestore(newest, catalog, { disks: [disk], definition })
  return chain.map(({ manifest }) => manifest.id)
}

test('only what a restore of the chosen disks reads has to be there', async () => {
  const backups = await stored()
  const { storage, full, middle, newest } = backups
  expect(await check(backups, 'vda', true)).toEqual([dayId(1), dayId(2), dayId(3)])
  storage.objects.delete(`${middle.folder}/domain.xml`)
  storage.objects.delete(`${full.folder}/vda.qcow2`)
  storage.objects.delete(`${newest.folder}/vdb.blake3`)
  expect(await check(backups, 'vda', true)).toHaveLength(3)
  await expect(check(backups, 'vdb')).rejects.toMatchObject({
    code: 'OBJECT_NOT_FOUND',
    context: { key: `${newest.folder}/vdb.blake3` },
  })
  storage.objects.delete(`${newest.folder}/domain.xml`)
  expect(await check(backups, 'vda')).toHaveLength(3)
  await expect(check(backups, 'vda', true)).rejects.toMatchObject({ code: 'OBJECT_NOT_FOUND' })
  storage.objects.set(`${middle.folder}/vda.qcow2`, Buffer.from('x'))
  await expect(check(backups, 'vda')).rejects.toMatchObject({ code: 'SIZE_MISMATCH' })
})

test('a link that is gone is no matter below a newer full image, and told of where a disk rests on it', async () => {
  const backups = await stored()
  const { storage, full } = backups
  storage.objects.set(`${full.folder}/manifest.json`, Buffer.from('no JSON'))
  expect(await check(backups, 'vda')).toEqual([dayId(2), dayId(3)])
  await expect(check(backups, 'vdb')).rejects.toMatchObject({
    code: 'CHAIN_BROKEN',
    message: expect.stringContaining('is broken (manifest: is not JSON'),
  })
  storage.objects.delete(`${full.folder}/manifest.json`)
  expect(await check(backups, 'vda')).toEqual([dayId(2), dayId(3)])
  await expect(check(backups, 'vdb')).rejects.toMatchObject({ code: 'CHAIN_BROKEN' })
  await expect(check(backups, 'vdc')).rejects.toMatchObject({ code: 'DISK_NOT_FOUND' })
})

test('a backup that this machine has too little memory to restore is refused by what its manifests say', async () => {
  const backups = await stored()
  const { folder, manifest } = backups.newest
  const tooLarge = 64 * 1024 * 1024
  const disks = manifest.disks.map(disk => ({ ...disk, digest: { ...disk.digest, blockSize: tooLarge } }))
  backups.storage.objects.set(`${folder}/manifest.json`, Buffer.from(JSON.stringify({ ...manifest, disks })))
  const catalog = await readCatalog(backups.storage, 'web-1/')
  const newest = catalog.backups.find(({ manifest: { id } }) => id === manifest.id) ?? expect.fail('not read')
  await expect(check({ ...backups, newest }, 'vda')).rejects.toMatchObject({
    code: 'INVALID_ARGUMENT',
    context: { needed: 8 * tooLarge },
  })
  const available = vi.spyOn(process, 'availableMemory').mockReturnValue(127)
  try {
    await expect(check(backups, 'vda')).rejects.toMatchObject({ context: { needed: 64, available: 127 } })
    available.mockReturnValue(128)
    expect(await check(backups, 'vda')).toHaveLength(3)
  } finally {
    available.mockRestore()
  }
})
