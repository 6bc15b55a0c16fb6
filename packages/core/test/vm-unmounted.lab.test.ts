import { rename, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { createQcow2, type LabDomain, qemuIo } from '@varve/testkit/lab'
import { execa } from 'execa'
import { afterAll, afterEach, beforeAll, expect, test } from 'vitest'
import { BackupPipeline } from '../src/backup-pipeline.ts'
import { LibvirtHost } from '../src/libvirt-host.ts'
import { recover } from '../src/recover.ts'
import { mountNew, type Unmountable } from './unmountable.ts'
import { MiB, useVmSite } from './vm-site.ts'

let mounted: Unmountable
beforeAll(async () => {
  mounted = await mountNew()
})
afterEach(() => mounted.mount()) // where a test failed
afterAll(() => mounted.dispose())

const site = useVmSite()
const { createVm, image } = site

const recoverNow = () => recover({ stateDir: site.stateDir, storages: [site.storage] })

/** Takes a backup, with a write in the middle, that ends as when the host loses power: before the overlay is merged. */
async function loseBackup(vm: LabDomain, overlayFolder?: string): Promise<string> {
  site.storage.beforePut = async key => {
    if (!key.endsWith('/manifest.json')) return
    site.storage.beforePut = undefined
    await vm.io('vda', 'write -P 0x22 1M 1M')
    await site.lab.stopLibvirtd()
  }
  const { storage, stateDir } = site
  const host = new LibvirtHost({ uri: site.lab.uri, ...(overlayFolder !== undefined && { overlayFolder }) })
  const error = await new BackupPipeline({ host, storage, stateDir })
    .run({ instance: vm.name })
    .catch(error => error)
  await site.lab.startLibvirtd()
  expect(error).toMatchObject({ code: 'BLOCK_COMMIT_FAILED' })
  await vm.killQemu()
  return error.context.overlay
}

async function definitionOf(vm: LabDomain): Promise<string> {
  const path = join(site.folder, 'domain.xml')
  await writeFile(path, await site.lab.virsh(['dumpxml', '--inactive', vm.name]))
  return path
}

const unresolved = (message: RegExp) => ({
  ok: false,
  runs: [
    {
      outcome: 'unresolved',
      error: { code: 'BLOCK_COMMIT_FAILED', message: expect.stringMatching(message) },
    },
  ],
})
const notMounted = unresolved(/may not be mounted yet.*define the disk on .*remove .*runs\/.*\.jsonl/)
const finished = { ok: true, runs: [{ outcome: 'finished' }] }

test('an overlay that the definition names, and that is not there, is on record until its file system is mounted', async () => {
  const vm = await createVm([{ target: 'vda', size: 4 * MiB }])
  const definition = await definitionOf(vm)
  await vm.start()
  const overlay = await loseBackup(vm, mounted.path)
  const disks = async () => (await site.host.disks(vm.name)).disks
  mounted.unmount()
  expect(await recoverNow()).toMatchObject(notMounted)
  expect(await disks()).toMatchObject([{ path: overlay }])
  mounted.mount()
  await rename(overlay, `${overlay}.away`)
  expect(await recoverNow()).toMatchObject(unresolved(/somebody has removed it.*define the disk on /))
  await rename(`${overlay}.away`, overlay)
  expect(await recoverNow()).toMatchObject(finished)
  expect(await disks()).toMatchObject([{ path: image('vda') }])
  await qemuIo(image('vda'), 'qcow2', ['read -P 0x22 1M 1M'])

  // What is lost for good: somebody decides for the disk, and it can be started.
  await vm.start()
  await rename(await loseBackup(vm, mounted.path), `${overlay}.lost`)
  expect(await recoverNow()).toMatchObject(unresolved(/somebody has removed it/))
  await site.lab.virsh(['define', definition])
  expect(await recoverNow()).toMatchObject(finished)
  await vm.start()
})

test('what an instance that is gone, as a transient one after a power cut, wrote to its overlay is on record until the file system of both is mounted', async () => {
  const path = join(mounted.path, 'vda')
  await createQcow2(path, 4 * MiB)
  const vm = await createVm([], { disks: [{ target: 'vda', path, format: 'qcow2' }] })
  const definition = await definitionOf(vm)
  await vm.start()
  await loseBackup(vm)
  await vm.undefine()
  try {
    mounted.unmount()
    expect(await recoverNow()).toMatchObject(notMounted)
    mounted.mount()
    await rename(path, `${path}.away`)
    expect(await recoverNow()).toMatchObject(unresolved(/disk itself.*not found.*move the overlay away/))
    await rename(`${path}.away`, path)
    expect(await recoverNow()).toMatchObject(finished)
    await qemuIo(path, 'qcow2', ['read -P 0x22 1M 1M'])
    expect(await recoverNow()).toEqual({ ok: true, runs: [] })
  } finally {
    await site.lab.virsh(['define', definition])
  }
})

test('an instance that was deleted and made anew under its name, with another disk, has no part in a backup of the former one', async () => {
  const vm = await createVm([{ target: 'vda', size: 4 * MiB }])
  const former = await site.lab.virsh(['dumpxml', '--inactive', vm.name])
  await vm.start()
  await loseBackup(vm)
  const defineAnewOn = async (path: string) => {
    const definition = join(site.folder, 'anew.xml')
    await vm.undefine()
    await writeFile(definition, former.replace(/<uuid>.*<\/uuid>/, '').replace(image('vda'), path))
    await site.lab.virsh(['define', definition])
  }
  // On a snapshot that somebody made of the former disk, it would have what the former one wrote under its own writes.
  const snapshot = join(site.folder, 'snapshot')
  await execa('qemu-img', ['create', '-q', '-f', 'qcow2', '-F', 'qcow2', '-b', image('vda'), snapshot])
  await qemuIo(snapshot, 'qcow2', ['write -P 0x55 2M 1M'])
  await defineAnewOn(snapshot)
  expect(await recoverNow()).toMatchObject(unresolved(/the disk writes to .*snapshot by now/))
  await qemuIo(snapshot, 'qcow2', ['read -P 0 1M 1M', 'read -P 0x55 2M 1M'])

  const path = join(site.folder, 'anew')
  await createQcow2(path, 4 * MiB)
  await qemuIo(path, 'qcow2', ['write -P 0x55 0 4M'])
  await defineAnewOn(path)
  expect(await site.backup()).toMatchObject({ disks: [{ name: 'vda', kind: 'full' }] })
  expect(await recoverNow()).toMatchObject(finished)
  await qemuIo(image('vda'), 'qcow2', ['read -P 0x22 1M 1M'])
  expect((await site.host.disks(vm.name)).disks).toMatchObject([{ path }])
  await qemuIo(path, 'qcow2', ['read -P 0x55 0 4M'])
  expect(await recoverNow()).toEqual({ ok: true, runs: [] })
})
