import { readdir, rm, stat, symlink, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { createQcow2, qemuIo, sha256Content } from '@varve/testkit/lab'
import { execa, execaSync } from 'execa'
import { expect, test } from 'vitest'
import { ChainManager } from '../src/chain-manager.ts'
import type { VarveEvent } from '../src/events.ts'
import type { MergeRecord, MergeState } from '../src/host.ts'
import { type RecoverReport, recover } from '../src/recover.ts'
import type { RunOptions } from '../src/run-options.ts'
import { MiB, useVmSite } from './vm-site.ts'

const site = useVmSite()
const { createVm, image, backup, content, storedSums, expectCleanHost } = site

const recoverNow = (): Promise<RecoverReport> =>
  recover({ stateDir: site.stateDir, storages: [site.storage] })

/** Has something happen right before an object of this name is stored, in the middle of the next backup. */
function before(name: string, happens: () => Promise<unknown>): void {
  site.storage.beforePut = async key => {
    if (!key.endsWith(`/${name}`)) return
    site.storage.beforePut = undefined
    await happens()
  }
}

/** Has something happen, at once, when libvirt has been asked this for the first time. */
function afterFirst(question: string, happens: () => void): (event: VarveEvent) => void {
  let done = false
  return event => {
    if (done || event.type !== 'command' || !event.args.includes(question)) return
    done = true
    happens()
  }
}

/** The file that each disk of the running instance writes to. */
async function sources(instance: string): Promise<Record<string, string>> {
  const table = await site.lab.virsh(['domblklist', instance])
  return Object.fromEntries([...table.matchAll(/^ (vd\w)\s+(\S+)$/gm)].map(([, disk, path]) => [disk, path]))
}

test('an overlay that cannot be committed is kept, holds the next backup up, and is merged by recover', async () => {
  const vm = await createVm([
    { target: 'vda', size: 16 * MiB },
    { target: 'vdb', size: 16 * MiB },
  ])
  await vm.start()
  const write = async (at: number) => {
    for (const disk of ['vda', 'vdb']) await vm.io(disk, `write -P ${0x40 + at} ${at}M 2M`)
  }
  const holds = (...places: number[]) => places.map(at => `read -P ${0x40 + at} ${at}M 2M`)
  await write(0)
  before('manifest.json', async () => {
    await write(3)
    // Somebody else's block job: libvirt refuses a commit beside it.
    const copy = ['blockcopy', vm.name, 'vda', '--dest', join(site.folder, 'copy'), '--format', 'qcow2']
    await site.lab.virsh([...copy, '--transient-job'])
  })
  const error = await backup().catch(error => error)
  const [published] = (await new ChainManager({ storage: site.storage }).list()).backups
  const id = published?.manifest.id ?? expect.fail('nothing was published')
  const overlay = `${image('vda')}.vda.varve-${id}`
  expect(error).toMatchObject({
    code: 'BLOCK_COMMIT_FAILED',
    message: expect.stringContaining('Block commit failed'),
    context: { published: id, disk: 'vda', overlay },
    retryable: true,
  })
  expect(await vm.state()).toBe('running')
  // The other disk is no reason to leave this one on its overlay.
  expect(await sources(vm.name)).toEqual({ vda: overlay, vdb: image('vdb') })

  await write(6)
  await expect(backup()).rejects.toMatchObject({ code: 'OVERLAY_LEFT_OVER' })
  await expect(backup({ disks: ['vdb'] })).rejects.toMatchObject({ code: 'OVERLAY_LEFT_OVER' })
  expect(await recoverNow()).toMatchObject({
    ok: false,
    runs: [{ id, outcome: 'unresolved', error: { code: 'BLOCK_COMMIT_FAILED' } }],
  })
  await site.lab.virsh(['blockjob', vm.name, 'vda', '--abort'])
  expect(await recoverNow()).toMatchObject({ ok: true, runs: [{ id, outcome: 'finished' }] })
  await expectCleanHost([`varve-${id}`])

  const next = await backup()
  expect(next).toMatchObject({ kind: 'incremental', parent: id })
  await vm.destroy()
  for (const disk of ['vda', 'vdb']) {
    await site.expectStored(published?.manifest ?? expect.fail(), [...holds(0), 'read -P 0 2M 14M'], disk)
    for (const path of [site.stored(next, `${disk}.qcow2`), image(disk)])
      await qemuIo(path, 'qcow2', [...holds(0, 3, 6), 'read -P 0 8M 8M'])
  }
})

test('an overlay under a snapshot that somebody made meanwhile is never removed', async () => {
  const vm = await createVm([{ target: 'vda', size: 16 * MiB }])
  await vm.start()
  const top = join(site.folder, 'theirs')
  const snapshot = [
    ...['snapshot-create-as', vm.name, '--disk-only', '--no-metadata'],
    ...['--diskspec', `vda,snapshot=external,file=${top}`],
  ]
  before('manifest.json', () => site.lab.virsh(snapshot))
  const error = await backup().catch(error => error)
  expect(error).toMatchObject({
    code: 'BLOCK_COMMIT_FAILED',
    message: expect.stringContaining(top),
    context: { overlay: expect.stringContaining('.varve-') },
  })
  expect((await stat(error.context.overlay)).isFile()).toBe(true)
  await expect(backup()).rejects.toMatchObject({ code: 'RUN_UNRESOLVED' })
  await site.lab.virsh(['blockcommit', vm.name, 'vda', '--active', '--shallow', '--pivot', '--wait'])
  expect(await recoverNow()).toMatchObject({ ok: true, runs: [{ outcome: 'finished' }] })
  await expectCleanHost([`varve-${error.context.published}`])

  // Before the freeze: the disk's own file is of that moment then.
  await rm(top)
  const early = await backup(
    {},
    {
      onEvent: event => {
        if (event.type === 'stage' && event.stage === 'freeze')
          execaSync('virsh', ['--connect', site.lab.uri, ...snapshot])
      },
    },
  ).catch(error => error)
  expect(early).toMatchObject({
    code: 'SNAPSHOT_FAILED',
    context: { disk: 'vda', path: image('vda'), found: top },
    retryable: true,
  })
  expect(await sources(vm.name)).toEqual({ vda: top })
  expect((await new ChainManager({ storage: site.storage }).list()).backups).toHaveLength(1)
  await vm.io('vda', 'write -P 0x77 1M 1M')
  await site.lab.virsh(['blockcommit', vm.name, 'vda', '--active', '--pivot', '--wait'])
  // What the run left under that snapshot goes with the next backup.
  const next = await backup()
  await expectCleanHost([`varve-${next.id}`])
  await site.expectStored(next, ['read -P 0x77 1M 1M'])
})

test('while disks are backed up all those of their instance are busy', async () => {
  const vm = await createVm([
    { target: 'vda', size: MiB },
    { target: 'vdb', size: MiB },
  ])
  await vm.start()
  const full = await backup()
  const others: unknown[] = []
  const tryAll = async () => {
    for (const disks of [['vda'], ['vdb']]) others.push(await backup({ disks }).catch(error => error.code))
    const restore = { backup: full.id, to: { instance: vm.name } }
    others.push(await site.restore(restore).catch(error => error.code))
  }
  before('manifest.json', tryAll)
  await backup({ disks: ['vda'] })
  before('manifest.json', tryAll) // now all of them are on overlays
  await backup()
  expect(others).toEqual(Array(6).fill('DISK_BUSY'))
  await backup({ disks: ['vdb'] })
})

test('a commit of somebody else is kept from a raw disk while it is read, and the backup shows one moment', async () => {
  const vm = await createVm([{ target: 'vda', size: 4 * MiB, format: 'raw' }])
  await vm.start()
  await vm.io('vda', 'write -P 0x11 0 2M')
  const wanted = await content('vda')
  let refusal: unknown
  before('vda.qcow2', async () => {
    await vm.io('vda', 'write -P 0x22 1M 2M')
    const commit = ['blockcommit', vm.name, 'vda', '--active', '--shallow', '--wait', '--pivot']
    refusal = await site.lab.virsh(commit).catch(error => error)
  })
  const manifest = await backup()
  expect(refusal).toMatchObject({ stderr: expect.stringContaining('lock') })
  expect(await storedSums(manifest)).toEqual({ vda: wanted })
  await expectCleanHost([])
  await vm.destroy()
  await qemuIo(image('vda'), 'raw', ['read -P 0x11 0 1M', 'read -P 0x22 1M 2M', 'read -P 0 3M 1M'])
})

test('a disk that leaves its overlay right after it was looked at is never merged into its template', async () => {
  const vm = await createVm([{ target: 'vda', size: 4 * MiB }])
  const template = join(site.folder, 'template')
  await createQcow2(template, 4 * MiB)
  await qemuIo(template, 'qcow2', ['write -P 0x5a 0 4M'])
  await execa('qemu-img', ['rebase', '-u', '-f', 'qcow2', '-F', 'qcow2', '-b', template, image('vda')])
  const untouched = await sha256Content(template, 'raw')
  await vm.start()
  const overlay = {
    disk: 'vda',
    base: image('vda'),
    baseFormat: 'qcow2',
    overlay: join(site.folder, 'top'),
  } as const
  const pivot = ['blockjob', vm.name, 'vda', '--pivot']
  /** Merges the overlay by hand, but for the pivot, and has the host go on from there. */
  const goOn = async (state: MergeRecord['state'], options: RunOptions = {}) => {
    await site.host.snapshot(vm.name, [overlay])
    await vm.io('vda', 'write -P 0x22 1M 1M')
    await site.lab.virsh(['blockcommit', vm.name, 'vda', '--active', '--shallow', '--wait'])
    const records: MergeState[] = []
    const record = (next: MergeState) => Promise.resolve(void records.push(next))
    await site.host.commitOverlay(vm.name, overlay, { state, record }, options)
    expect(await sources(vm.name)).toEqual({ vda: image('vda') })
    return records
  }
  const pivots = () => ({
    onEvent: afterFirst('dumpxml', () => execaSync('virsh', ['--connect', site.lab.uri, ...pivot])),
  })
  // A virsh that outlives the backup puts the disk on its base, or has not come so far.
  expect(await goOn('pivot', pivots())).toEqual([])
  expect(await goOn('pivot')).toEqual(['unmerged', 'pivot', 'merged'])
  // A person does. That anybody has merged the overlay is not known, so it stays.
  await expect(goOn(undefined, pivots())).rejects.toMatchObject({ code: 'BLOCK_COMMIT_FAILED' })
  expect((await stat(overlay.overlay)).isFile()).toBe(true)
  await vm.destroy()
  expect(await sha256Content(template, 'raw')).toBe(untouched)
  await qemuIo(image('vda'), 'qcow2', ['read -P 0x5a 0 1M', 'read -P 0x22 1M 1M', 'read -P 0x5a 2M 2M'])
})

test('a disk that is to be on another file after the next start is refused, as its last writes could be left behind', async () => {
  const vm = await createVm([{ target: 'vda', size: 16 * MiB }])
  await vm.start()
  const link = join(site.folder, 'link')
  await symlink(image('vda'), link)
  const definition = join(site.folder, 'domain.xml')
  await writeFile(
    definition,
    (await site.lab.virsh(['dumpxml', '--inactive', vm.name])).replace(`'${image('vda')}'`, `'${link}'`),
  )
  await site.lab.virsh(['define', definition])
  await expect(backup()).rejects.toMatchObject({
    code: 'SNAPSHOT_FAILED',
    context: { disk: 'vda', runsOn: image('vda'), definedAs: link },
  })
  await expectCleanHost([])
  expect(await readdir(site.storagePath)).toEqual([])
})

test('a qemu-nbd that is killed in the middle of an upload is named, and nothing stays', async () => {
  const vm = await createVm([{ target: 'vda', size: 16 * MiB }])
  await qemuIo(image('vda'), 'qcow2', ['write -P 0x11 0 16M'])
  const wanted = await sha256Content(image('vda'), 'qcow2')
  await vm.start()
  let killed = 0
  const error = await backup(
    { bandwidth: 4 * MiB },
    {
      onEvent: event => {
        if (killed > 0 || event.type !== 'progress' || event.bytesDone === 0) return
        const { stdout } = execaSync('pgrep', ['-f', `^qemu-nbd .*${image('vda')}$`])
        killed = Number(stdout)
        process.kill(killed, 'SIGKILL')
      },
    },
  ).catch(error => error)
  expect(killed).toBeGreaterThan(0)
  expect(error).toMatchObject({
    code: 'NBD_FAILED',
    message: expect.stringMatching(/disk vda.*qemu-nbd.*SIGKILL.*try again/is),
    context: { disk: 'vda' },
    retryable: true,
  })
  await expectCleanHost([])
  expect(await readdir(site.storagePath)).toEqual([])
  expect(await storedSums(await backup())).toEqual({ vda: wanted })
})
