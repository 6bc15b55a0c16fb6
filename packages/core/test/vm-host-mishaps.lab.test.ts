import { join } from 'node:path'
import { createQcow2, qemuIo } from '@varve/testkit/lab'
import { execa, execaSync } from 'execa'
import { expect, test } from 'vitest'
import { ChainManager } from '../src/chain-manager.ts'
import { isVarveError } from '../src/errors.ts'
import type { VarveEvent } from '../src/events.ts'
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

/** Has something happen, at once, when a stage of a backup begins. */
function onStage(stage: string, happens: () => void): (event: VarveEvent) => void {
  let done = false
  return event => {
    if (done || event.type !== 'stage' || event.stage !== stage) return
    done = true
    happens()
  }
}

async function expectHolds(manifest: BackupManifest, reads: readonly string[]): Promise<void> {
  await qemuIo(await site.restored(manifest), 'qcow2', reads)
}

/** Somebody else's block job on a disk: libvirt refuses a commit beside it. */
function blockJob(instance: string): () => string[] {
  const copy = ['blockcopy', instance, 'vda', '--dest', join(site.folder, 'copy'), '--format', 'qcow2']
  const start = () => site.lab.virsh([...copy, '--transient-job'])
  before('manifest.json', start)
  return () => ['blockjob', instance, 'vda', '--abort']
}

test('QEMU may be killed in any stage: what was flushed stays, and no increment lacks any of it', async () => {
  const vm = await createVm([{ target: 'vda', size: 16 * MiB }])
  await vm.start()
  let last = await backup()
  // While the overlay is active QEMU has stored the bitmaps of its base; else those that it has open are lost with it.
  const stages = {
    mark: 'full',
    freeze: 'full',
    export: 'incremental',
    publish: 'incremental',
    thaw: 'incremental',
    retire: 'full',
  } as const
  let pattern = 0x20
  for (const [stage, kind] of Object.entries(stages)) {
    pattern += 2
    await vm.io('vda', `write -P ${pattern} 1M 2M`)
    const pid = await vm.qemuPid()
    let published: BackupManifest | undefined
    const onEvent = onStage(stage, () => process.kill(pid, 'SIGKILL'))
    try {
      published = await backup({}, { onEvent })
    } catch (error) {
      expect(isVarveError(error), String(error)).toBe(true)
    }
    await vm.waitForState('shut off')
    expect(await recoverNow(), stage).toMatchObject({ ok: true })
    const newest = (await new ChainManager({ storage: site.storage }).list()).backups.at(-1)?.manifest
    if (published) expect(newest, stage).toEqual(published)
    if (newest && newest.id !== last.id) await expectHolds(newest, [`read -P ${pattern} 1M 2M`])
    await vm.start()
    await vm.io('vda', `write -P ${pattern + 1} 2M 2M`)
    last = await backup()
    expect(last, stage).toMatchObject({ kind })
    if (kind === 'full') expect(last.disks[0]?.fallback, stage).toBe('bitmap-inconsistent')
    await expectHolds(last, [`read -P ${pattern} 1M 1M`, `read -P ${pattern + 1} 2M 2M`])
    await site.expectCleanHost([`varve-${last.id}`])
  }
})

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

test.each(['reset, as by a reboot from inside', 'switched off and on again'])(
  'an instance that is %s in the middle goes on on its overlay, which is merged',
  async what => {
    const vm = await createVm([{ target: 'vda', size: 16 * MiB }])
    await vm.start()
    await vm.io('vda', FIRST)
    before('vda.qcow2', async () => {
      await vm.io('vda', 'write -P 0x22 2M 2M')
      if (what.startsWith('reset')) await site.lab.virsh(['reset', vm.name])
      else {
        await vm.destroy()
        await vm.start()
      }
      await vm.io('vda', 'write -P 0x22 4M 2M')
    })
    const full = await backup()
    await site.expectCleanHost([`varve-${full.id}`])
    await expectHolds(full, HELD)
    await vm.io('vda', 'write -P 0x33 8M 1M')
    const next = await backup()
    expect(next).toMatchObject({ kind: 'incremental', parent: full.id })
    await expectHolds(next, [...NOW, 'read -P 0x33 8M 1M'])
    await vm.destroy()
    await qemuIo(image('vda'), 'qcow2', [...NOW, 'read -P 0x33 8M 1M'])
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
  await qemuIo(await site.restored(added, 'vdb'), 'qcow2', ['read -P 0x44 0 1M', 'read -P 0 1M 7M'])

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
  await qemuIo(await site.restored(replaced, 'vdb'), 'qcow2', ['read -P 0x66 0 1M', 'read -P 0 1M 7M'])
})
