import { rename, rm } from 'node:fs/promises'
import { join } from 'node:path'
import { createQcow2, qemuIo } from '@varve/testkit/lab'
import { thoroughTest } from '@varve/testkit/thorough'
import { execa, execaSync } from 'execa'
import { expect, test } from 'vitest'
import type { BackupManifest } from '../src/manifest.ts'
import { type RecoverReport, recover } from '../src/recover.ts'
import { MiB, useVmSite } from './vm-site.ts'

const site = useVmSite()
const { createVm, image, backup } = site

const recoverNow = (): Promise<RecoverReport> =>
  recover({ stateDir: site.stateDir, storages: [site.storage] })

/** What the disk holds when the backup of a test begins, and after what the guest writes meanwhile. */
const FIRST = 'write -P 0x11 0 4M'
const HELD = ['read -P 0x11 0 4M', 'read -P 0 4M 12M']
const MEANWHILE = 'write -P 0x22 2M 4M'
const NOW = ['read -P 0x11 0 2M', 'read -P 0x22 2M 4M', 'read -P 0 6M 2M']

/** Has something happen in the middle of the next backup, right before an object of this name is stored. */
function before(name: string, happens: () => Promise<unknown>): void {
  site.storage.beforePut = async key => {
    if (!key.endsWith(`/${name}`)) return
    site.storage.beforePut = undefined
    await happens()
  }
}

async function expectHolds(manifest: BackupManifest, reads: readonly string[]): Promise<void> {
  await site.expectStored(manifest, reads)
}

/** Somebody else's block job on a disk: libvirt refuses a commit beside it. */
function blockJob(instance: string): () => string[] {
  const copy = ['blockcopy', instance, 'vda', '--dest', join(site.folder, 'copy'), '--format', 'qcow2']
  const start = () => site.lab.virsh([...copy, '--transient-job'])
  before('manifest.json', start)
  return () => ['blockjob', instance, 'vda', '--abort']
}

test('a libvirtd that is restarted in the middle, and one that is away at the end, cost no write', async () => {
  const vm = await createVm([{ target: 'vda', size: 16 * MiB }])
  await vm.start()
  await vm.io('vda', FIRST)
  before('vda.qcow2', async () => {
    await site.lab.stopLibvirtd()
    await site.lab.startLibvirtd()
    await vm.io('vda', MEANWHILE)
  })
  const full = await backup()
  await site.expectCleanHost([`varve-${full.id}`])
  await expectHolds(full, HELD)

  before('manifest.json', () => site.lab.stopLibvirtd())
  const error = await backup().catch(error => error)
  expect(error).toMatchObject({
    code: 'BLOCK_COMMIT_FAILED',
    context: { published: expect.any(String), disk: 'vda' },
  })
  await site.lab.startLibvirtd()
  await vm.io('vda', 'write -P 0x33 8M 1M')
  await expect(backup()).rejects.toMatchObject({ code: 'OVERLAY_LEFT_OVER' })
  expect(await recoverNow()).toMatchObject({ ok: true, runs: [{ outcome: 'finished' }] })
  const next = await backup()
  expect(next).toMatchObject({ kind: 'incremental', parent: error.context.published })
  await expectHolds(next, [...NOW, 'read -P 0x33 8M 1M'])
  await vm.destroy()
  await qemuIo(image('vda'), 'qcow2', [...NOW, 'read -P 0x33 8M 1M'])
})

thoroughTest(
  'an instance that is reset, or switched off and on again, in the middle goes on on its overlay, which is merged',
  async () => {
    const vm = await createVm([{ target: 'vda', size: 16 * MiB }])
    await vm.start()
    await vm.io('vda', FIRST)
    before('vda.qcow2', async () => {
      await vm.io('vda', 'write -P 0x22 2M 2M')
      await site.lab.virsh(['reset', vm.name]) // as by a reboot from inside
      await vm.io('vda', 'write -P 0x22 4M 2M')
    })
    const full = await backup()
    await site.expectCleanHost([`varve-${full.id}`])
    await expectHolds(full, HELD)

    before('vda.qcow2', async () => {
      await vm.io('vda', 'write -P 0x33 8M 1M')
      await vm.destroy()
      await vm.start()
      await vm.io('vda', 'write -P 0x44 9M 1M')
    })
    const next = await backup()
    expect(next).toMatchObject({ kind: 'incremental', parent: full.id })
    await expectHolds(next, [...NOW, 'read -P 0 8M 8M'])
    const last = await backup()
    expect(last).toMatchObject({ kind: 'incremental', parent: next.id })
    await vm.destroy()
    const now = [...NOW, 'read -P 0x33 8M 1M', 'read -P 0x44 9M 1M', 'read -P 0 10M 6M']
    await expectHolds(last, now)
    await qemuIo(image('vda'), 'qcow2', now)
  },
)

test('a block commit that failed is tried again, and after that by recover, also when the instance is off by then', async () => {
  const vm = await createVm([{ target: 'vda', size: 16 * MiB }])
  await vm.start()
  await vm.io('vda', FIRST)
  const abort = blockJob(vm.name)
  const warnings: string[] = []
  const full = await backup(
    {},
    {
      onEvent: event => {
        if (event.type !== 'warning') return
        warnings.push(event.message)
        execaSync('virsh', ['--connect', site.lab.uri, ...abort()])
      },
    },
  )
  expect(warnings).toEqual([expect.stringMatching(/^Block commit failed.*Trying once more/s)])
  await site.expectCleanHost([`varve-${full.id}`])

  await execa('rm', ['-f', join(site.folder, 'copy')])
  blockJob(vm.name)
  const { context } = await backup().catch(error => error)
  expect(context).toMatchObject({ published: expect.any(String), disk: 'vda' })
  await vm.io('vda', MEANWHILE)
  await vm.destroy()
  await expect(backup()).rejects.toMatchObject({ code: 'OVERLAY_LEFT_OVER' })
  expect(await recoverNow()).toMatchObject({ ok: true, runs: [{ outcome: 'finished' }] })
  await site.expectCleanHost([`varve-${context.published}`])
  await qemuIo(image('vda'), 'qcow2', NOW)
  await expectHolds(await backup(), NOW)
})

test('disks that are added, resized or replaced between backups, or resized in the middle, are backed up as they are', async () => {
  const vm = await createVm([{ target: 'vda', size: 16 * MiB }])
  await vm.start()
  await vm.io('vda', FIRST)
  await backup()

  await createQcow2(image('vdb'), 8 * MiB)
  const add = ['attach-disk', vm.name, image('vdb'), 'vdb', '--driver', 'qemu', '--subdriver', 'qcow2']
  await site.lab.virsh([...add, '--live', '--config'])
  await vm.io('vdb', 'write -P 0x44 0 1M')
  const added = await backup()
  expect(added.disks).toMatchObject([
    { name: 'vda', kind: 'incremental' },
    { name: 'vdb', kind: 'full', fallback: 'disk-new' },
  ])
  await site.expectStored(added, ['read -P 0x44 0 1M', 'read -P 0 1M 7M'], 'vdb')

  before('vda.qcow2', async () => {
    await site.lab.virsh(['blockresize', vm.name, 'vda', '24M'])
    await vm.io('vda', MEANWHILE, 'write -P 0x55 20M 1M')
  })
  await backup()
  const grown = await backup()
  expect(grown.disks).toMatchObject([{ kind: 'incremental', virtualSize: 24 * MiB }, { name: 'vdb' }])
  await expectHolds(grown, [...NOW, 'read -P 0x55 20M 1M', 'read -P 0 21M 3M'])

  await vm.destroy()
  await execa('qemu-img', ['resize', '-q', '--shrink', '-f', 'qcow2', image('vda'), '8M'])
  const other = join(site.folder, 'other')
  await createQcow2(other, 8 * MiB)
  await qemuIo(other, 'qcow2', ['write -P 0x66 0 1M'])
  await execa('mv', [other, image('vdb')])
  const replaced = await backup()
  expect(replaced.disks).toMatchObject([
    { name: 'vda', kind: 'full', fallback: 'disk-shrunk', virtualSize: 8 * MiB },
    { name: 'vdb', kind: 'full', fallback: 'bitmap-missing' },
  ])
  await expectHolds(replaced, NOW)
  await site.expectStored(replaced, ['read -P 0x66 0 1M', 'read -P 0 1M 7M'], 'vdb')
})

test('a disk whose file was moved or removed under a running instance is told of, and what to do saves it', async () => {
  const vm = await createVm([{ target: 'vda', size: 16 * MiB }])
  await vm.start()
  await vm.io('vda', FIRST)
  const moved = join(site.folder, 'moved')
  await rename(image('vda'), moved)
  await expect(backup()).rejects.toMatchObject({
    code: 'DISK_NOT_FOUND',
    message: expect.stringMatching(/vda.*instance runs.*put it back.*virsh blockcopy/s),
    context: { disk: 'vda', path: image('vda') },
  })
  await rename(moved, image('vda'))
  await expectHolds(await backup(), HELD)

  await rm(image('vda'))
  await expect(backup()).rejects.toMatchObject({ code: 'DISK_NOT_FOUND' })
  const copy = ['blockcopy', vm.name, 'vda', '--dest', moved, '--format', 'qcow2', '--transient-job']
  await site.lab.virsh([...copy, '--wait', '--finish'])
  await vm.destroy()
  await qemuIo(moved, 'qcow2', HELD)
})
