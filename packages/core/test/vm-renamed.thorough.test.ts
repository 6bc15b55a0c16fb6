import { qemuIo } from '@varve/testkit/lab'
import { expect, test } from 'vitest'
import { VarveError } from '../src/errors.ts'
import { isFileDisk } from '../src/host.ts'
import { recover } from '../src/recover.ts'
import { MiB, useVmSite } from './vm-site.ts'

const site = useVmSite()
const { createVm, image, backup } = site

const FULL = new VarveError('STORAGE_FULL', 'There is no room.')

/** Has something happen when the disk's image is to be stored by the next backup, which fails then. */
function failAfter(happens: () => Promise<unknown>): void {
  site.storage.beforePut = async key => {
    if (!key.endsWith('/vda.qcow2')) return
    site.storage.beforePut = undefined
    await happens()
    throw FULL
  }
}

async function marks(instance: string): Promise<string[]> {
  const { disks } = await site.host.instance(instance)
  return disks
    .filter(isFileDisk)
    .flatMap(({ bitmaps }) => bitmaps.flatMap(({ names }) => names))
    .sort()
}

test('the bitmap of a backup that came to nothing goes from its disk, whatever instance that belongs to by then', async () => {
  const vm = await createVm([{ target: 'vda', size: 4 * MiB }])
  const called = (name: string) => site.lab.virsh(['domrename', name === vm.name ? 'renamed' : vm.name, name])
  const full = await backup()
  const kept = await marks(vm.name)
  expect(kept).toHaveLength(2) // with its twin

  failAfter(() => called('renamed'))
  await expect(backup()).rejects.toBe(FULL)
  expect(await marks('renamed')).toEqual(kept)
  await called(vm.name)

  // One that runs under its new name when the run is settled.
  await vm.start()
  failAfter(async () => {
    await vm.io('vda', 'write -P 0x11 0 1M')
    await site.lab.stopLibvirtd()
  })
  await expect(backup()).rejects.toMatchObject({ code: 'BLOCK_COMMIT_FAILED' })
  await site.lab.startLibvirtd()
  await vm.destroy()
  await called('renamed')
  await site.lab.virsh(['start', 'renamed'])
  const settled = { ok: true, runs: [{ outcome: 'undone' }] }
  expect(await recover({ stateDir: site.stateDir, storages: [site.storage] })).toMatchObject(settled)
  expect(await marks('renamed')).toEqual(kept)
  await site.lab.virsh(['destroy', 'renamed'])
  await called(vm.name)
  await site.expectCleanHost([`varve-${full.id}`])
  await qemuIo(image('vda'), 'qcow2', ['read -P 0x11 0 1M', 'read -P 0 1M 3M'])
})
