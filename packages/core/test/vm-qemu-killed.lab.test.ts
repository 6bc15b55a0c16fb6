import { rm, statfs } from 'node:fs/promises'
import { join } from 'node:path'
import { Readable } from 'node:stream'
import { mountTmpfs, qemuIo, type Tmpfs } from '@varve/testkit/lab'
import { execa } from 'execa'
import { afterAll, beforeAll, expect, onTestFinished, test, vi } from 'vitest'
import { BackupPipeline } from '../src/backup-pipeline.ts'
import { type JournalStepName, RunJournal } from '../src/journal.ts'
import { LibvirtHost } from '../src/libvirt-host.ts'
import { readImageInfo } from '../src/qemu-img.ts'
import { recover } from '../src/recover.ts'
import { expectSurvives } from './qemu-kills.ts'
import { MiB, useVmSite } from './vm-site.ts'

let small: Tmpfs
// Before the lab, whose libvirt sees what was mounted when it started.
beforeAll(async () => {
  small = await mountTmpfs('size=20m')
})
afterAll(() => small.dispose())

const site = useVmSite()
const { createVm, image, backup } = site

/** Has something happen once a half of an object's first bytes has been taken from the backup. */
function inTheMiddleOf(name: string, happens: () => Promise<void>): void {
  const { storage } = site
  const put = storage.put.bind(storage)
  storage.put = (key, body, options) => {
    if (!key.endsWith(`/${name}`) || body instanceof Readable) return put(key, body, options)
    storage.put = put
    const open: typeof body.open = range => Readable.from(halted(body.open(range), happens))
    const { size = expect.fail('an image has a size'), replayable } = body
    return put(key, { size, replayable, open }, options)
  }
}

async function* halted(bytes: AsyncIterable<Buffer>, happens: () => Promise<void>): AsyncGenerator<Buffer> {
  let halts = true
  for await (const chunk of bytes) {
    const half = halts ? Math.ceil(chunk.length / 2) : 0
    yield chunk.subarray(0, half)
    if (halts) await happens()
    halts = false
    yield chunk.subarray(half)
  }
}

/** Has something happen once a journal has recorded a step, and before anything is done about it. */
function atStep(name: JournalStepName, happens: () => Promise<void>): void {
  const { record } = RunJournal.prototype
  const recording = vi.spyOn(RunJournal.prototype, 'record').mockImplementation(async function (
    this: RunJournal,
    step,
  ) {
    await record.call(this, step)
    if (step.step !== name) return
    recording.mockRestore()
    await happens()
  })
  onTestFinished(() => recording.mockRestore()) // where it never came to that
}

/** The bitmaps that an image has which nobody has open. */
async function bitmapsIn(path: string): Promise<string[]> {
  return (await readImageInfo(path, 'qcow2', {})).bitmaps.map(({ name }) => name)
}

const NOTHING = { ok: true, runs: [] }
const recoverNow = () => recover({ stateDir: site.stateDir, storages: [site.storage] })

test('QEMU may be killed while its disk is read and while the last object is stored: no write is lost, and increments go on', async () => {
  const vm = await createVm([{ target: 'vda', size: 32 * MiB }])
  await vm.start()
  await vm.io('vda', 'write -P 0x11 0 28M')
  inTheMiddleOf('vda.qcow2', async () => {
    await vm.io('vda', 'write -P 0x22 1M 2M')
    await vm.killQemu()
  })
  const full = await backup()
  expect(await vm.state()).toBe('shut off')
  await site.expectCleanHost([`varve-${full.id}`])
  expect(await recoverNow()).toEqual(NOTHING)
  await site.expectStored(full, ['read -P 0x11 0 28M'])
  await qemuIo(image('vda'), 'qcow2', ['read -P 0x11 0 1M', 'read -P 0x22 1M 2M', 'read -P 0x11 3M 25M'])

  // And started again at once, on its overlay.
  await vm.start()
  await vm.io('vda', 'write -P 0x33 2M 2M')
  inTheMiddleOf('manifest.json', async () => {
    await vm.io('vda', 'write -P 0x44 3M 2M')
    await vm.killQemu()
    await vm.start()
    await vm.io('vda', 'write -P 0x55 4M 2M')
  })
  const increment = await backup()
  expect(increment).toMatchObject({ kind: 'incremental', parent: full.id })
  expect(await vm.state()).toBe('running')
  await site.expectCleanHost([`varve-${increment.id}`])
  await site.expectStored(increment, ['read -P 0x22 1M 1M', 'read -P 0x33 2M 2M', 'read -P 0x11 4M 24M'])
  const last = await backup()
  expect(last).toMatchObject({ kind: 'incremental', parent: increment.id })
  const now = ['read -P 0x33 2M 1M', 'read -P 0x44 3M 1M', 'read -P 0x55 4M 2M', 'read -P 0x11 6M 22M']
  await qemuIo(await site.restored(last), 'qcow2', now)
  await vm.destroy()
  await qemuIo(image('vda'), 'qcow2', now)
})

// Before the overlay is active and after; while it is, see above. The other stages are in the thorough mode.
test('QEMU may be killed in a stage: what was flushed stays, and no increment lacks any of it', () =>
  expectSurvives(site, ['mark', 'retire']))

test('QEMU may be killed right before a disk is put back onto its base: the backup is right, and the next one full', async () => {
  const vm = await createVm([{ target: 'vda', size: 16 * MiB }])
  await vm.start()
  await vm.io('vda', 'write -P 0x11 0 4M')
  inTheMiddleOf('manifest.json', () => vm.io('vda', 'write -P 0x22 2M 4M'))
  atStep('pivot', () => vm.killQemu())
  const manifest = await backup()
  await site.expectCleanHost([`varve-${manifest.id}`])
  expect(await recoverNow()).toEqual(NOTHING)
  await site.expectStored(manifest, ['read -P 0x11 0 4M'])
  await vm.start()
  const next = await backup()
  // QEMU had the bitmaps of the base open for writing again.
  expect(next.disks).toMatchObject([{ kind: 'full', fallback: 'bitmap-inconsistent' }])
  await site.expectStored(next, ['read -P 0x11 0 2M', 'read -P 0x22 2M 4M'])
})

test('bitmaps that QEMU was killed with before it wrote them are gone, and what comes next is a full backup', async () => {
  const vm = await createVm([{ target: 'vda', size: 16 * MiB }])
  await vm.start()
  await vm.io('vda', 'write -P 0x11 0 4M')
  // libvirt then makes the overlay of an instance that is off.
  atStep('snapshot', () => vm.killQemu())
  const first = await backup()
  await site.expectCleanHost([])
  expect(await recoverNow()).toEqual(NOTHING)
  await site.expectStored(first, ['read -P 0x11 0 4M'])
  await vm.start()
  await vm.io('vda', 'write -P 0x22 2M 4M')
  const full = await backup()
  expect(full.disks).toMatchObject([{ kind: 'full', fallback: 'bitmap-missing' }])
  await site.expectStored(full, ['read -P 0x11 0 2M', 'read -P 0x22 2M 4M'])
})

/** Leaves a file system no room, and returns what gives it back. */
async function fill(folder: string): Promise<() => Promise<void>> {
  const { bavail, bsize } = await statfs(folder)
  const path = join(folder, 'rest')
  await execa('fallocate', ['--length', String(bavail * bsize), path])
  return () => rm(path)
}

test('a backup whose bitmaps never came onto a full disk is right, and no increment rests on it', async () => {
  const path = join(small.path, 'vda')
  const allocated = ['-o', 'preallocation=falloc']
  await execa('qemu-img', ['create', '-q', '-f', 'qcow2', ...allocated, path, `${16 * MiB}`])
  const disks = [{ target: 'vda', path, format: 'qcow2' } as const]
  const vm = await site.lab.createDomain({ name: 'full', guest: false, disks })
  const host = new LibvirtHost({ uri: site.lab.uri, overlayFolder: site.folder })
  const pipeline = new BackupPipeline({ host, storage: site.storage, stateDir: site.stateDir })
  const request = { instance: vm.name, overlayReserve: 0 }
  try {
    await vm.start()
    await vm.io('vda', 'write -P 0x11 0 4M')
    const makeRoom = await fill(small.path)
    // It keeps the disk to itself then, as it could not write them.
    await expect(pipeline.run(request)).rejects.toMatchObject({ code: 'DISK_BUSY' })
    expect(await vm.state()).toBe('running')
    await vm.io('vda', 'write -P 0x22 2M 4M')

    atStep('export', () => vm.killQemu()) // the disk cannot be served before it is gone
    const published = await pipeline.run(request)
    await site.expectStored(published, ['read -P 0x11 0 2M', 'read -P 0x22 2M 4M'])
    expect(await bitmapsIn(path)).toEqual([])
    await makeRoom()
    await vm.start()
    await vm.io('vda', 'write -P 0x33 4M 4M')
    const next = await pipeline.run(request)
    expect(next.disks).toMatchObject([{ kind: 'full', fallback: 'bitmap-missing' }])
    await site.expectStored(next, ['read -P 0x11 0 2M', 'read -P 0x22 2M 2M', 'read -P 0x33 4M 4M'])
    expect(await recoverNow()).toEqual(NOTHING)
  } finally {
    if ((await vm.state()) !== 'shut off') await vm.destroy()
    await vm.undefine()
    await rm(path)
  }
})
