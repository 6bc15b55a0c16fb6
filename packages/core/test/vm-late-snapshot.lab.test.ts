import fs, { chmod, mkdir, readFile, rm, stat, writeFile } from 'node:fs/promises'
import { syncBuiltinESMExports } from 'node:module'
import { join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { isPaused, pauseProcess, qemuIo } from '@varve/testkit/lab'
import { thoroughTest } from '@varve/testkit/thorough'
import { execa } from 'execa'
import { expect, onTestFinished, test } from 'vitest'
import type { DiskOverlay, MergeRecord } from '../src/host.ts'
import { folderIdentity } from '../src/presence.ts'
import { recover } from '../src/recover.ts'
import { MiB, useVmSite } from './vm-site.ts'

const site = useVmSite()
const { createVm, image, backup } = site

const recoverNow = () => recover({ stateDir: site.stateDir, storages: [site.storage] })

async function until(isSo: () => Promise<boolean>): Promise<void> {
  while (!(await isSo())) await delay(20)
}

/** A `virsh` that stops before it does anything, when it is told to make a snapshot, and leaves its id in a file. */
async function haltingVirsh(): Promise<{ folder: string; pidFile: string }> {
  const folder = join(site.folder, 'bin')
  const pidFile = join(folder, 'pid')
  const { stdout: virsh } = await execa('which', ['virsh'])
  await mkdir(folder)
  await writeFile(
    join(folder, 'virsh'),
    `#!/bin/sh\ncase "$*" in *snapshot-create-as*) echo $$ > ${pidFile}; kill -STOP $$ ;; esac\nexec ${virsh} "$@"\n`,
  )
  await chmod(join(folder, 'virsh'), 0o755)
  return { folder, pidFile }
}

/** Kills a backup that has asked for its snapshot, and resolves with the `virsh` that is still to ask libvirt. */
async function dieBeforeSnapshot(instance: string): Promise<number> {
  const { folder, pidFile } = await haltingVirsh()
  const { uri } = site.lab
  const { storagePath, stateDir } = site
  const program = fileURLToPath(new URL('./die-mid-backup.ts', import.meta.url))
  const child = execa(process.execPath, ['--import', 'tsx', program], {
    env: {
      PATH: `${folder}:${process.env.PATH}`,
      VARVE_TEST: JSON.stringify({ uri, storagePath, stateDir, instance }),
    },
    reject: false,
  })
  const pid = async () => Number(await readFile(pidFile, 'utf8').catch(() => ''))
  await until(async () => (await pid()) > 0 && (await isPaused(await pid())))
  child.kill('SIGKILL')
  expect((await child).signal).toBe('SIGKILL')
  return pid()
}

thoroughTest(
  'a snapshot that comes after its run was settled is found by the next backup, or restore, and merged by recover',
  async () => {
    const vm = await createVm([
      { target: 'vda', size: 4 * MiB },
      { target: 'vdb', size: 4 * MiB, format: 'raw' },
    ])
    await vm.start()
    await vm.io('vda', 'write -P 0x11 0 1M')
    const full = await backup()
    const virsh = await dieBeforeSnapshot(vm.name)
    const settled = await recoverNow()
    expect(settled).toMatchObject({ ok: true, runs: [{ outcome: 'undone' }] })
    await site.expectCleanHost([`varve-${full.id}`])
    await vm.io('vda', 'write -P 0x22 1M 1M')
    await vm.io('vdb', 'write -P 0x22 1M 1M')

    process.kill(virsh, 'SIGCONT')
    const { id = expect.fail('no run') } = settled.runs[0] ?? {}
    const paths = async () => (await site.host.disks(vm.name)).disks.map(({ path }) => path)
    await until(async () => (await paths()).every(path => path.endsWith(`.varve-${id}`)))
    await vm.io('vda', 'write -P 0x33 2M 1M')
    await vm.io('vdb', 'write -P 0x33 2M 1M')
    expect(await recoverNow()).toEqual({ ok: true, runs: [] }) // nobody has told it yet
    const found = { code: 'OVERLAY_LEFT_OVER' }
    await expect(backup()).rejects.toMatchObject(found)
    await rm(join(site.stateDir, 'runs', `${id}.jsonl`)) // and nobody has again
    await expect(site.restore({ backup: full.id, to: { instance: vm.name } })).rejects.toMatchObject(found)
    expect(await recoverNow()).toEqual(settled)
    await site.expectCleanHost([`varve-${full.id}`])

    const next = await backup()
    expect(next).toMatchObject({
      parent: full.id,
      disks: [{ kind: 'incremental' }, { kind: 'full', fallback: 'format-raw' }],
    })
    const reads = ['read -P 0x22 1M 1M', 'read -P 0x33 2M 1M', 'read -P 0 3M 1M']
    await site.expectStored(next, ['read -P 0x11 0 1M', ...reads])
    await site.expectStored(next, ['read -P 0 0 1M', ...reads], 'vdb')
    await vm.destroy()
    await qemuIo(image('vda'), 'qcow2', ['read -P 0x11 0 1M', ...reads])
    await qemuIo(image('vdb'), 'raw', ['read -P 0 0 1M', ...reads])
  },
)

/** How a merge is told of an overlay that has not come yet. */
const AWAITED: MergeRecord = { state: undefined, arrivesBy: 0, record: async () => undefined }

async function overlayOf(disk: string): Promise<DiskOverlay> {
  const overlay = join(site.folder, 'overlay')
  return { disk, base: image(disk), baseFormat: 'raw', overlay, folder: await folderIdentity(overlay) }
}

test('a snapshot that libvirt has begun is waited for before its overlay counts as never made', async () => {
  const vm = await createVm([{ target: 'vda', size: MiB, format: 'raw' }])
  await vm.start()
  const overlay = await overlayOf('vda')
  const qemu = await vm.qemuPid()
  let isMerged = false
  const asks = async () =>
    (await execa('pgrep', ['-f', `qemu-monitor-command ${vm.name}`], { reject: false })).exitCode === 0
  await pauseProcess(qemu)
  const snapshot = site.host.snapshot(vm.name, [overlay])
  try {
    await until(async () => !(await site.lab.virsh(['domcontrol', vm.name])).startsWith('ok'))
    const merging = site.host.commitOverlay(vm.name, overlay, AWAITED).finally(() => {
      isMerged = true
    })
    await until(async () => isMerged || (await asks()))
    expect(isMerged).toBe(false)
    process.kill(qemu, 'SIGCONT')
    await merging
  } finally {
    process.kill(qemu, 'SIGCONT')
    await snapshot
  }
  expect((await site.host.disks(vm.name)).disks).toMatchObject([{ path: image('vda') }])
  await expect(stat(overlay.overlay)).rejects.toMatchObject({ code: 'ENOENT' })
})

test('an overlay that comes right after it was looked for is not removed', async () => {
  const vm = await createVm([{ target: 'vda', size: MiB, format: 'raw' }])
  await vm.start()
  const overlay = await overlayOf('vda')
  const look = fs.stat
  const setStat = (stat: unknown) => {
    Reflect.set(fs, 'stat', stat)
    syncBuiltinESMExports()
  }
  onTestFinished(() => setStat(look))
  setStat(async (...args: Parameters<typeof look>) => {
    if (args[0] !== overlay.overlay) return look(...args)
    setStat(look)
    const found = look(...args)
    await found.catch(() => undefined)
    await site.host.snapshot(vm.name, [overlay])
    return found
  })
  await site.host.commitOverlay(vm.name, overlay, { state: undefined, record: async () => undefined })
  await vm.io('vda', 'write -P 0x11 0 64k')
  expect((await site.host.disks(vm.name)).disks).toMatchObject([{ path: overlay.overlay }])
  await stat(overlay.overlay)
  await site.host.commitOverlay(vm.name, overlay, { state: undefined, record: async () => undefined })
  await vm.destroy()
  await qemuIo(image('vda'), 'raw', ['read -P 0x11 0 64k'])
})
