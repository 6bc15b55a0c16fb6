import { type LabDomain, qemuIo } from '@varve/testkit/lab'
import { expect, test } from 'vitest'
import type { BackupManifest } from '../src/manifest.ts'
import { MiB, useVmSite } from './vm-site.ts'

const site = useVmSite()

async function makeReadOnly(vm: LabDomain, disk: string): Promise<void> {
  const xml = await site.lab.virsh(['dumpxml', '--inactive', vm.name])
  const target = `<target dev='${disk}' bus='virtio'/>`
  expect(xml).toContain(target)
  await site.host.define(xml.replace(target, `${target}<readonly/>`))
}

test('a disk that the guest can only read is in each backup as a whole, and holds up no other', async () => {
  const vm = await site.createVm([
    { target: 'vda', size: 4 * MiB },
    { target: 'vdb', size: 4 * MiB },
  ])
  await qemuIo(site.image('vdb'), 'qcow2', ['write -P 0x44 1M 1M'])
  await site.backup() // its bitmap is on both
  await makeReadOnly(vm, 'vdb')

  const backups: BackupManifest[] = []
  const take = async () => {
    const manifest = await site.backup()
    backups.push(manifest)
    await site.expectStored(manifest, ['read -P 0 0 1M', 'read -P 0x44 1M 1M', 'read -P 0 2M 2M'], 'vdb')
  }
  await vm.start()
  await take()
  await vm.io('vda', 'write -P 0x11 0 1M')
  await take()
  await site.expectCleanHost([`varve-${backups.at(-1)?.id}`], ['vda'])
  await vm.destroy()
  await take()
  await site.expectCleanHost([`varve-${backups.at(-1)?.id}`], ['vda'])
  await site.expectCleanHost([], ['vdb'])
  await vm.start()
  await take()
  for (const { disks } of backups)
    expect(disks).toMatchObject([{ kind: 'incremental' }, { kind: 'full', fallback: 'disk-readonly' }])
})
