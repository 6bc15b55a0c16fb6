import { createQcow2, createRaw, type LabDomain, qemuIo } from '@varve/testkit/lab'
import { execa } from 'execa'
import { expect, onTestFinished, test } from 'vitest'
import { z } from 'zod'
import { BackupPipeline } from '../src/backup-pipeline.ts'
import { LibvirtHost } from '../src/libvirt-host.ts'
import { recover } from '../src/recover.ts'
import { RestorePipeline } from '../src/restore-pipeline.ts'
import { MiB, useVmSite } from './vm-site.ts'

const site = useVmSite()
const { image, restored } = site
const SIZE = 4 * MiB

const nodes = z.array(z.object({ drv: z.string(), file: z.string() }))

/** The drivers of QEMU's nodes on a file. */
async function driversOn(vm: LabDomain, path: string): Promise<string[]> {
  const found = nodes.parse(await vm.qmp('query-named-block-nodes', { flat: true }))
  return found.filter(({ file }) => file === path).map(({ drv }) => drv)
}

/** A raw file, a raw block device and a qcow2 image on a raw template. */
async function createVm(): Promise<{ vm: LabDomain; device: string }> {
  await createRaw(image('vdb'), SIZE)
  await createRaw(image('template'), SIZE)
  await qemuIo(image('template'), 'raw', ['write -P 0x77 0 4M'])
  const { stdout: device } = await execa('losetup', ['--find', '--show', image('vdb')])
  onTestFinished(async () => void (await execa('losetup', ['--detach', device])))
  const raw = { format: 'raw', discard: 'unmap' } as const
  const vm = await site.createVm([{ target: 'vda', size: SIZE, format: 'raw' }], {
    bareRaw: true,
    disks: [
      { target: 'vda', path: image('vda'), ...raw },
      { target: 'vdb', path: device, blockDevice: true, ...raw },
      { target: 'vdc', path: image('vdc'), format: 'qcow2', discard: 'unmap' },
    ],
  })
  await execa('qemu-img', ['create', '-f', 'qcow2', '-F', 'raw', '-b', image('template'), image('vdc')])
  await vm.start()
  return { vm, device }
}

test('raw disks and templates that QEMU has without a node of the raw driver are backed up and restored', async () => {
  const { vm, device } = await createVm()
  const host = new LibvirtHost({ uri: site.lab.uri, overlayFolder: site.folder })
  const pipelines = { host, storage: site.storage, stateDir: site.stateDir }
  const backup = () => new BackupPipeline(pipelines).run({ instance: vm.name })
  expect(await driversOn(vm, image('vda'))).toEqual(['file'])
  expect(await driversOn(vm, device)).toEqual(['host_device'])
  expect(await driversOn(vm, image('template'))).toEqual(['file'])

  await vm.io('vda', 'write -P 0x11 0 1M')
  await vm.io('vdb', 'write -P 0x22 0 1M')
  await vm.io('vdc', 'write -P 0x33 0 1M')
  const full = await backup()
  expect(full).toMatchObject({ kind: 'full', consistency: 'crash' })
  for (const disk of ['vda', 'vdb', 'vdc']) await vm.io(disk, 'write -P 0x44 1M 1M')
  const next = await backup()
  expect(next.disks).toMatchObject([
    { kind: 'full', source: { path: image('vda'), format: 'raw' } },
    { kind: 'full', source: { path: device, format: 'raw' } },
    { kind: 'incremental' },
  ])
  const wanted = [
    ['vda', 'read -P 0x11 0 1M', 'read -P 0x44 1M 1M', 'read -P 0 2M 2M'],
    ['vdb', 'read -P 0x22 0 1M', 'read -P 0x44 1M 1M', 'read -P 0 2M 2M'],
    ['vdc', 'read -P 0x33 0 1M', 'read -P 0x44 1M 1M', 'read -P 0x77 2M 2M'],
  ] as const
  for (const [disk, ...reads] of wanted) await qemuIo(await restored(next, disk), 'qcow2', reads)

  for (const disk of ['vda', 'vdb', 'vdc']) await vm.io(disk, 'write -P 0x55 0 4M')
  const to = { instance: vm.name }
  await new RestorePipeline(pipelines).run({ backup: next.id, to, inPlace: true, powerOffTimeoutMs: 1 })
  expect(await vm.state()).toBe('running')
  expect(await driversOn(vm, image('vda'))).toEqual(['file'])
  await vm.destroy()
  const [[, ...ofFile], [, ...ofDevice], [, ...ofImage]] = wanted
  await qemuIo(image('vda'), 'raw', ofFile)
  await qemuIo(device, 'raw', ofDevice)
  await qemuIo(image('vdc'), 'qcow2', ofImage)
  await qemuIo(image('template'), 'raw', ['read -P 0x77 0 4M'])
})

test('another file in the place of a bare template is refused, and so is a raw disk that QEMU has as an image', async () => {
  const { vm } = await createVm()
  const backup = (disk: string) => site.backup({ disks: [disk] })
  await createQcow2(image('inner'), MiB)
  await execa('dd', [`if=${image('inner')}`, `of=${image('vda')}`, 'conv=notrunc'])
  const file = { driver: 'file', filename: image('vda'), locking: 'off', 'read-only': true }
  await vm.qmp('blockdev-add', { driver: 'qcow2', 'node-name': 'image', 'read-only': true, file })
  expect((await driversOn(vm, image('vda'))).sort()).toEqual(['file', 'file', 'qcow2'])
  await expect(backup('vda')).rejects.toMatchObject({ code: 'DISK_UNSUPPORTED' })
  await vm.qmp('blockdev-del', { 'node-name': 'image' })
  expect(await backup('vda')).toMatchObject({ kind: 'full' })

  await vm.destroy()
  await createRaw(image('other'), SIZE)
  const other = `<backingStore type='file'><format type='raw'/><source file='${image('other')}'/><backingStore/></backingStore>`
  const xml = await site.lab.virsh(['dumpxml', '--inactive', vm.name])
  await site.host.define(xml.replace(`<source file='${image('vdc')}'/>`, `$&${other}`))
  await vm.start()
  expect(await driversOn(vm, image('other'))).toEqual(['file'])
  await expect(backup('vdc')).rejects.toMatchObject({
    code: 'DISK_UNSUPPORTED',
    context: { disk: 'vdc', given: image('other'), named: image('template') },
    message: expect.stringContaining(`${image('other')} (raw) for the instance`),
  })

  // QEMU itself may name the format of a backing file so.
  await vm.destroy()
  await execa('qemu-img', ['rebase', '-u', '-f', 'qcow2', '-F', 'file', '-b', image('other'), image('vdc')])
  expect(await backup('vdc')).toMatchObject({ kind: 'full', consistency: 'offline' })
})

test('an overlay whose header names a file by the driver of files is known by recover, and merged', async () => {
  const { vm } = await createVm()
  const id = '20260101-000000-000-0000ab'
  const overlay = `${image('vda')}.vda.varve-${id}`
  const spec = `vda,snapshot=external,driver=qcow2,file=${overlay}`
  const others = ['vdb', 'vdc'].flatMap(other => ['--diskspec', `${other},snapshot=no`])
  await site.lab.virsh([
    'snapshot-create-as',
    vm.name,
    '--disk-only',
    '--no-metadata',
    '--diskspec',
    spec,
    ...others,
  ])
  await vm.io('vda', 'write -P 0x66 0 1M')
  await vm.destroy()
  await execa('qemu-img', ['rebase', '-u', '-f', 'qcow2', '-F', 'file', '-b', image('vda'), overlay])
  await expect(site.backup({ disks: ['vda'] })).rejects.toMatchObject({ code: 'OVERLAY_LEFT_OVER' })
  const settled = await recover({ stateDir: site.stateDir, storages: [site.storage] })
  expect(settled).toMatchObject({ ok: true, runs: [{ id }] })
  await qemuIo(image('vda'), 'raw', ['read -P 0x66 0 1M'])
})
