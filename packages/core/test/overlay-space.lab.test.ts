import { once } from 'node:events'
import { existsSync, statfsSync, writeFileSync } from 'node:fs'
import { mkdtemp, readdir, rm, truncate, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { createQcow2, type LabDomain, mountTmpfs, qemuIo, type Tmpfs } from '@varve/testkit/lab'
import { execa } from 'execa'
import { afterAll, beforeAll, expect, onTestFinished, test } from 'vitest'
import { BackupPipeline } from '../src/backup-pipeline.ts'
import type { VarveEvent } from '../src/events.ts'
import { LibvirtHost } from '../src/libvirt-host.ts'
import { defaultReserve, lackOfSpace, type SizedOverlay } from '../src/overlay-space.ts'
import { bytesBody, type StoredObject } from '../src/storage.ts'
import { MiB, PausingStorage, useVmSite } from './vm-site.ts'

let small: Tmpfs
// Before the lab, whose libvirt sees what was mounted when it started.
beforeAll(async () => {
  small = await mountTmpfs('size=24m')
})
afterAll(() => small.dispose())

const site = useVmSite()

/** The guest writes a lot while an object is stored, which takes until the backup is given up. */
class SlowStorage extends PausingStorage {
  vm: LabDomain | undefined
  slow = ''
  write = 'write -P 0x22 1M 12M'

  override async put(...args: Parameters<PausingStorage['put']>): Promise<StoredObject> {
    const [key, , { signal } = {}] = args
    if (key.endsWith(this.slow) && signal) {
      await this.vm?.io('vda', this.write)
      if (!signal.aborted) await once(signal, 'abort')
    }
    return super.put(...args)
  }
}

test('a backup is given up before its overlay has no room left, at each object that is stored, and the guest goes on with all it wrote', async () => {
  const vm = await site.createVm([{ target: 'vda', size: 16 * MiB }])
  await vm.start()
  await vm.io('vda', 'write -P 0x11 0 2M')
  const storage = new SlowStorage({ path: site.storagePath })
  const host = new LibvirtHost({ uri: site.lab.uri, overlayFolder: small.path })
  const pipeline = new BackupPipeline({ host, storage, stateDir: site.stateDir })
  for (const slow of ['vda.qcow2', 'manifest.json']) {
    Object.assign(storage, { vm, slow })
    await expect(pipeline.run({ instance: vm.name, overlayReserve: 16 * MiB })).rejects.toMatchObject({
      code: 'OVERLAY_SPACE_LOW',
      message: expect.stringMatching(/merged back.*overlayFolder/s),
      context: { folder: small.path },
      retryable: true,
    })
    expect(await vm.state()).toBe('running')
    await site.expectCleanHost([])
  }

  // Without the need to keep so much there is room, and the next backup has it all.
  const reads = ['read -P 0x11 0 1M', 'read -P 0x22 1M 12M', 'read -P 0 13M 3M']
  await site.expectStored(await site.backup({ overlayReserve: MiB }), reads)
  await site.expectHolds('vda', ...reads)
})

/** A storage that goes on when it is told to end an upload, and completes it seconds after the merge has begun. */
class DeafStorage extends PausingStorage {
  readonly order: string[] = []
  readonly merged = Promise.withResolvers<void>()
  vm: LabDomain | undefined

  override async put(...args: Parameters<PausingStorage['put']>): Promise<StoredObject> {
    const [key] = args
    if (!key.endsWith('vda.qcow2')) return super.put(...args)
    await this.vm?.io('vda', 'write -P 0x22 1M 12M')
    await Promise.race([this.merged.promise, sleep(8_000, undefined, { ref: false })])
    await sleep(2_000)
    this.order.push('put')
    return super.put(key, bytesBody(Buffer.from('late')))
  }

  readonly onEvent = (event: VarveEvent) => {
    if (event.type !== 'command' || !event.args.includes('blockcommit')) return
    this.order.push('blockcommit')
    this.merged.resolve()
  }
}

test('an overlay whose room runs low is merged though the storage does not end its upload, of which nothing is left', async () => {
  const vm = await site.createVm([{ target: 'vda', size: 16 * MiB }])
  await vm.start()
  await vm.io('vda', 'write -P 0x11 0 2M')
  const storage = Object.assign(new DeafStorage({ path: site.storagePath }), { vm })
  const { onEvent, order } = storage
  const host = new LibvirtHost({ uri: site.lab.uri, overlayFolder: small.path })
  const pipeline = new BackupPipeline({ host, storage, stateDir: site.stateDir })
  const run = pipeline.run({ instance: vm.name, overlayReserve: 16 * MiB }, { onEvent })
  await expect(run).rejects.toMatchObject({ code: 'OVERLAY_SPACE_LOW' })
  expect(order).toEqual(['blockcommit', 'put'])
  expect(await readdir(site.storagePath)).toEqual([])
  await site.expectCleanHost([])
  await site.expectHolds('vda', 'read -P 0x11 0 1M', 'read -P 0x22 1M 12M', 'read -P 0 13M 3M')
})

test('a backup does not begin where its overlay would have too little room', async () => {
  const vm = await site.createVm([{ target: 'vda', size: 16 * MiB }])
  await vm.start()
  const host = new LibvirtHost({ uri: site.lab.uri, overlayFolder: small.path })
  const pipeline = new BackupPipeline({ host, storage: site.storage, stateDir: site.stateDir })
  await expect(pipeline.run({ instance: vm.name, overlayReserve: 25 * MiB })).rejects.toMatchObject({
    code: 'OVERLAY_SPACE_LOW',
    context: { folder: small.path, needed: 25 * MiB },
  })
  await site.expectCleanHost([])
  await pipeline.run({ instance: vm.name }) // 5 % of 24 MiB are kept free
})

test('where the room runs low while the overlay is merged, that is told, and the backup is complete', async () => {
  const vm = await site.createVm([{ target: 'vda', size: 16 * MiB }])
  await vm.start()
  await vm.io('vda', 'write -P 0x11 0 2M')
  const rest = join(small.path, 'rest')
  onTestFinished(() => rm(rest, { force: true }))
  const warnings: string[] = []
  const onEvent = (event: VarveEvent) => {
    if (event.type === 'warning') warnings.push(event.message)
    if (event.type === 'stage' && event.stage === 'thaw') {
      const { bavail, bsize } = statfsSync(small.path)
      writeFileSync(rest, Buffer.alloc(bavail * bsize - MiB))
    }
  }
  const host = new LibvirtHost({ uri: site.lab.uri, overlayFolder: small.path })
  const pipeline = new BackupPipeline({ host, storage: site.storage, stateDir: site.stateDir })
  const manifest = await pipeline.run({ instance: vm.name, overlayReserve: 2 * MiB }, { onEvent })
  expect(warnings).toEqual([expect.stringMatching(new RegExp(`${small.path} has ${MiB} bytes left while`))])
  await site.expectCleanHost([`varve-${manifest.id}`])
})

test('a folder of overlays that is not there, or is none, is told before anything was done', async () => {
  const vm = await site.createVm([{ target: 'vda', size: MiB }])
  await vm.start()
  for (const overlayFolder of [join(site.folder, 'typo'), site.image('vda')]) {
    const host = new LibvirtHost({ uri: site.lab.uri, overlayFolder })
    const stages: string[] = []
    const run = new BackupPipeline({ host, storage: site.storage, stateDir: site.stateDir }).run(
      { instance: vm.name },
      { onEvent: event => void (event.type === 'stage' && stages.push(event.stage)) },
    )
    await expect(run).rejects.toMatchObject({
      code: 'INVALID_ARGUMENT',
      message: expect.stringMatching(new RegExp(`${overlayFolder}.*Make that folder, or set overlayFolder`)),
      context: { overlayFolder },
    })
    expect(stages).toEqual(['plan'])
  }
  expect(existsSync(site.stateDir)).toBe(false)
})

test('where nobody can tell how much room there is, no backup begins', async () => {
  const base = join(site.folder, 'gone', 'vda')
  const overlays = [
    { disk: 'vda', base, baseFormat: 'raw', overlay: `${base}.varve`, virtualSize: MiB },
  ] as const
  await expect(lackOfSpace(overlays, 0)).rejects.toMatchObject({
    code: 'OVERLAY_SPACE_LOW',
    message: expect.stringMatching(/gone.*back up again/),
  })
})

/** Writes so many bytes into a new file. */
async function filled(folder: string, bytes: number): Promise<string> {
  const path = join(await mkdtemp(join(folder, 'filled-')), 'file')
  await writeFile(path, Buffer.alloc(bytes, 1))
  onTestFinished(() => rm(path, { force: true }))
  return path
}

test('1 GiB is kept free by default, or a twentieth of a file system of less than 20 GiB', async () => {
  const GiB = 1024 * MiB
  expect([1000, 20, 10].map(size => defaultReserve(size * GiB))).toEqual([GiB, GiB, 512 * MiB])
  const overlay = await filled(small.path, 22.5 * MiB)
  // A disk that is written in full does not grow.
  const one = { disk: 'vda', base: overlay, baseFormat: 'raw', overlay, virtualSize: 22.5 * MiB } as const
  expect(await lackOfSpace([one], undefined)).toBeUndefined()
  await filled(small.path, MiB / 2)
  const needed = Math.floor(1.2 * MiB)
  expect(await lackOfSpace([one], undefined)).toMatchObject({
    context: { folder: expect.any(String), needed },
  })
})

test('disks have room for all that their overlays hold, as far as they can grow', async () => {
  const folder = await mkdtemp(join(small.path, 'bases-'))
  const overlays: SizedOverlay[] = []
  for (const disk of ['vda', 'vdb']) {
    const base = join(folder, disk)
    await writeFile(base, '')
    await truncate(base, 16 * MiB)
    const overlay = await filled(site.folder, 8 * MiB)
    overlays.push({ disk, base, baseFormat: 'raw', overlay, virtualSize: 16 * MiB })
  }
  const rest = await filled(small.path, 12 * MiB)
  const [one, other] = overlays as [SizedOverlay, SizedOverlay]
  for (const each of overlays) expect(await lackOfSpace([each], 0)).toBeUndefined()
  expect(await lackOfSpace([one], 5 * MiB)).toMatchObject({ context: { folder, needed: 13 * MiB } })
  expect(await lackOfSpace([one, other], 0)).toMatchObject({ context: { folder, needed: 16 * MiB } })
  // A disk of 2 MiB takes up no more; a device, as it is, none at all.
  expect(await lackOfSpace([one, { ...other, virtualSize: 2 * MiB }], 0)).toBeUndefined()
  expect(await lackOfSpace([one, { ...other, base: '/dev/zero' }], 0)).toBeUndefined()
  await truncate(rest, 0)
  expect(await lackOfSpace([one, other], 0)).toBeUndefined()
})

/** A qcow2 image of 8 MiB, written in full, in the small file system. With a snapshot inside, all is to be kept. */
async function fullImage(snapshot: boolean): Promise<string> {
  const path = join(await mkdtemp(join(small.path, 'full-')), 'vda')
  onTestFinished(() => rm(path, { force: true }))
  await createQcow2(path, 8 * MiB)
  await qemuIo(path, 'qcow2', ['write -P 0x11 0 8M'])
  if (snapshot) await execa('qemu-img', ['snapshot', '-c', 'before', path])
  return path
}

test('a disk grows by all that its overlay holds where internal snapshots keep what is written over', async () => {
  const overlay = await filled(site.folder, 6 * MiB)
  const lack = async (base: string, reserve: number) =>
    lackOfSpace([{ disk: 'vda', base, baseFormat: 'qcow2', overlay, virtualSize: 8 * MiB }], reserve)
  const full = await fullImage(false)
  expect(await lack(full, 12 * MiB)).toBeUndefined()
  await rm(full)
  const needed = 18 * MiB
  expect(await lack(await fullImage(true), 12 * MiB)).toMatchObject({ context: { needed } })
})

test('a backup of a disk with internal snapshots is given up while its overlay can be merged', async () => {
  const base = await fullImage(true)
  const disk = { target: 'vda', path: base, format: 'qcow2', discard: 'unmap' } as const
  const vm = await site.createVm([], { disks: [disk] })
  await vm.start()
  const storage = new SlowStorage({ path: site.storagePath })
  Object.assign(storage, { vm, slow: 'vda.qcow2', write: 'write -P 0x22 0 8M' })
  const host = new LibvirtHost({ uri: site.lab.uri, overlayFolder: site.folder })
  const pipeline = new BackupPipeline({ host, storage, stateDir: site.stateDir })
  const { bavail, bsize } = statfsSync(small.path)
  const overlayReserve = bavail * bsize - 4 * MiB
  await expect(pipeline.run({ instance: vm.name, overlayReserve })).rejects.toMatchObject({
    code: 'OVERLAY_SPACE_LOW',
    context: { folder: expect.stringContaining(small.path) },
  })
  const { disks } = await site.host.disks(vm.name)
  expect(disks).toMatchObject([{ name: 'vda', path: base }])
  await qemuIo(base, 'qcow2', ['read -P 0x22 0 8M'], { isOpen: true })
})
