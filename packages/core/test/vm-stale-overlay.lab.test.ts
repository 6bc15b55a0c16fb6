import { randomUUID } from 'node:crypto'
import { once } from 'node:events'
import { readFile, rename, stat, utimes, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import {
  createQcow2,
  type LabDomain,
  mountTmpfs,
  qemuIo,
  sha256Content,
  type Tmpfs,
} from '@varve/testkit/lab'
import { execa } from 'execa'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { fileIdentity } from '../src/bitmap-twin.ts'
import { type FileState, fileState } from '../src/file-state.ts'
import type { DiskOverlay, MergeRecord } from '../src/host.ts'
import { recover } from '../src/recover.ts'
import { MiB, useVmSite } from './vm-site.ts'

let elsewhere: Tmpfs
beforeAll(async () => {
  elsewhere = await mountTmpfs('size=20m')
})
afterAll(() => elsewhere.dispose())

const site = useVmSite()
const { createVm, image, backup } = site

const recoverNow = () => recover({ stateDir: site.stateDir, storages: [site.storage] })

const overlayIn = (folder: string): DiskOverlay => ({
  disk: 'vda',
  base: image('vda'),
  baseFormat: 'qcow2',
  overlay: join(folder, 'overlay'),
})

async function createOverlay({ base, overlay }: DiskOverlay): Promise<void> {
  await execa('qemu-img', ['create', '-q', '-f', 'qcow2', '-F', 'qcow2', '-b', base, overlay])
}

/** What is known of a merge that no process has begun. */
const UNMERGED: MergeRecord = { state: undefined, record: async () => undefined }

/** Takes a backup that cannot merge its overlay, as libvirtd is away then; returns the overlay. */
async function backupWithoutMerge(meanwhile: () => Promise<unknown>): Promise<string> {
  site.storage.beforePut = async key => {
    if (!key.endsWith('/manifest.json')) return
    site.storage.beforePut = undefined
    await meanwhile()
    await site.lab.stopLibvirtd()
  }
  const error = await backup().catch(error => error)
  await site.lab.startLibvirtd()
  expect(error).toMatchObject({ code: 'BLOCK_COMMIT_FAILED' })
  return error.context.overlay
}

/** SHA-256 of what each of the files shows. */
const shownBy = (...paths: string[]) => Promise.all(paths.map(path => sha256Content(path, 'qcow2')))

async function expectGone(path: string): Promise<void> {
  await expect(stat(path)).rejects.toMatchObject({ code: 'ENOENT' })
}

/** What a person does who has decided for the overlay. */
async function mergeByHand(overlay: string): Promise<void> {
  await execa('qemu-img', ['commit', '-f', 'qcow2', overlay])
}

/** Gives a file the time of a host whose clock was an hour behind when it was written to. */
async function setBack(path: string): Promise<void> {
  const { mtimeMs } = await stat(path)
  await utimes(path, new Date(), new Date(mtimeMs - 3_600_000))
}

/** Writes the definition of an instance to a file, each text in it replaced. */
async function definitionOf(
  vm: LabDomain,
  replaced: readonly (readonly [string, string])[] = [],
): Promise<string> {
  const path = join(site.folder, 'domain.xml')
  let xml = await site.lab.virsh(['dumpxml', '--inactive', vm.name])
  for (const [from, to] of replaced) xml = xml.replace(from, to)
  await writeFile(path, xml)
  return path
}

const stale = {
  code: 'BLOCK_COMMIT_FAILED',
  message: expect.stringMatching(/written to since.*Decide which of the two holds.*qemu-img commit/s),
}
const isOther = {
  code: 'BLOCK_COMMIT_FAILED',
  message: expect.stringMatching(/is another file by now.*copied together.*qemu-img commit/s),
}
const unresolved = { ok: false, runs: [{ outcome: 'unresolved', error: stale }] }
const finished = { ok: true, runs: [{ outcome: 'finished' }] }

test('what a transient instance wrote since it was created anew on its disk is kept from an overlay of before', async () => {
  const vm = await createVm([{ target: 'vda', size: 4 * MiB }])
  const definition = await definitionOf(vm)
  await vm.start()
  await site.lab.virsh(['undefine', vm.name])
  try {
    await vm.io('vda', 'write -P 0x11 0 1M')
    const overlay = await backupWithoutMerge(() => vm.io('vda', 'write -P 0x22 1M 1M'))
    await vm.killQemu() // as when the host loses power
    await site.lab.virsh(['create', definition])
    await vm.io('vda', 'write -P 0x33 1M 2M')
    expect(await recoverNow()).toMatchObject(unresolved) // while it runs
    await vm.destroy()
    await setBack(image('vda'))
    const before = await shownBy(image('vda'), overlay)
    expect(await recoverNow()).toMatchObject(unresolved)
    expect(await shownBy(image('vda'), overlay)).toEqual(before)
    await qemuIo(image('vda'), 'qcow2', ['read -P 0x11 0 1M', 'read -P 0x33 1M 2M'])
    await mergeByHand(overlay)
    expect(await recoverNow()).toMatchObject(finished)
    await qemuIo(image('vda'), 'qcow2', ['read -P 0x22 1M 1M', 'read -P 0x33 2M 1M'])
    await expectGone(overlay)
  } finally {
    await site.lab.virsh(['define', definition])
  }
})

test('an instance that is defined on its overlay, and was run without it on another host, loses nothing that it wrote there', async () => {
  const vm = await createVm([{ target: 'vda', size: 4 * MiB }])
  const definition = await definitionOf(vm)
  for (const decision of ['overlay', 'base'] as const) {
    await vm.start()
    await vm.io('vda', 'write -P 0x11 0 4M')
    const overlay = await backupWithoutMerge(() => vm.io('vda', 'write -P 0x22 1M 1M'))
    await vm.killQemu()
    await qemuIo(image('vda'), 'qcow2', ['write -P 0x33 1M 2M']) // a QEMU that this libvirt knows nothing of
    const before = await shownBy(image('vda'), overlay)
    expect(await recoverNow()).toMatchObject(unresolved)
    expect(await shownBy(image('vda'), overlay)).toEqual(before)
    expect((await site.host.disks(vm.name)).disks).toMatchObject([{ path: overlay }])
    if (decision === 'overlay') await mergeByHand(overlay)
    else {
      await site.lab.virsh(['define', definition])
      await rename(overlay, join(site.folder, 'away'))
    }
    expect(await recoverNow()).toMatchObject(finished)
    expect((await site.host.disks(vm.name)).disks).toMatchObject([{ path: image('vda') }])
    await qemuIo(image('vda'), 'qcow2', [`read -P ${decision === 'base' ? 0x33 : 0x22} 1M 1M`])
    await expectGone(overlay)
  }

  // A copy that somebody puts back by hand, with its old time, is another disk.
  const copy = join(site.folder, 'copy')
  await execa('cp', ['-a', image('vda'), copy])
  await vm.start()
  const overlay = await backupWithoutMerge(() => vm.io('vda', 'write -P 0x44 1M 1M'))
  await vm.killQemu()
  const original = join(site.folder, 'original')
  await rename(image('vda'), original)
  await rename(copy, image('vda'))
  const before = await shownBy(image('vda'))
  const refused = { ok: false, runs: [{ outcome: 'unresolved', error: isOther }] }
  expect(await recoverNow()).toMatchObject(refused)
  await site.lab.virsh(['define', definition])
  expect(await recoverNow()).toMatchObject(refused)
  expect(await shownBy(image('vda'))).toEqual(before)

  // So is one that was copied with its overlay, as to a larger file system, but to that it belongs.
  for (const [from, to] of [
    [original, image('vda')],
    [overlay, `${overlay}.copy`],
  ] as const)
    await execa('cp', ['-a', from, to])
  await rename(`${overlay}.copy`, overlay)
  expect(await recoverNow()).toMatchObject(refused)
  await mergeByHand(overlay)
  expect(await recoverNow()).toMatchObject(finished)
  await qemuIo(image('vda'), 'qcow2', ['read -P 0x44 1M 1M'])
  await expectGone(overlay)
})

test('where another domain has the disk of an instance that is gone, the overlay is merged unless that one has run', async () => {
  const vm = await createVm([{ target: 'vda', size: 4 * MiB }])
  const overlay = overlayIn(site.folder)
  const original = await site.lab.virsh(['dumpxml', '--inactive', vm.name])
  const uuid = /<uuid>.*<\/uuid>/.exec(original)?.[0] ?? expect.fail()
  const successor = await definitionOf(vm, [
    [`<name>${vm.name}<`, '<name>successor<'],
    [uuid, ''],
  ])
  const loseDomain = async (pattern: number) => {
    await vm.start()
    await site.host.snapshot(vm.name, [overlay])
    await vm.io('vda', `write -P ${pattern} 0 1M`)
    await vm.destroy()
    await vm.undefine()
    await site.lab.virsh(['define', successor])
  }
  const merging = () => site.host.commitOverlay(vm.name, overlay, UNMERGED)
  const restoreDefinition = async () => {
    await site.lab.virsh(['undefine', 'successor'])
    await writeFile(join(site.folder, 'original.xml'), original)
    await site.lab.virsh(['define', join(site.folder, 'original.xml')])
  }
  await loseDomain(0x11)
  // On a snapshot of the disk it would have what the former one wrote under its own writes.
  const snapshot = join(site.folder, 'snapshot')
  await createOverlay({ ...overlay, overlay: snapshot })
  await site.lab.virsh(['undefine', 'successor'])
  const onSnapshot = join(site.folder, 'on-snapshot.xml')
  await writeFile(onSnapshot, (await readFile(successor, 'utf8')).replace(image('vda'), snapshot))
  await site.lab.virsh(['define', onSnapshot])
  await expect(merging()).rejects.toMatchObject({
    code: 'BLOCK_COMMIT_FAILED',
    message: expect.stringContaining('the disk vda of successor is on a snapshot of it'),
  })
  await qemuIo(snapshot, 'qcow2', ['read -P 0 0 1M'])
  await site.lab.virsh(['undefine', 'successor'])
  await site.lab.virsh(['define', successor])
  await merging()
  expect((await site.host.disks('successor')).disks).toMatchObject([{ path: image('vda') }])
  await qemuIo(image('vda'), 'qcow2', ['read -P 0x11 0 1M'])
  await expectGone(overlay.overlay)
  await restoreDefinition()

  await loseDomain(0x22)
  await site.lab.virsh(['start', 'successor'])
  await expect(merging()).rejects.toMatchObject(stale)
  await site.lab.virsh(['destroy', 'successor'])
  await qemuIo(image('vda'), 'qcow2', ['write -P 0x33 1M 1M'])
  await expect(merging()).rejects.toMatchObject(stale)
  await qemuIo(image('vda'), 'qcow2', ['read -P 0x11 0 1M', 'read -P 0x33 1M 1M'])
  await qemuIo(overlay.overlay, 'qcow2', ['read -P 0x22 0 1M'])
  await restoreDefinition()
})

test('a disk that was unplugged from an instance which goes on is on its base at the next start', async () => {
  const vm = await createVm([{ target: 'vda', size: MiB }])
  const overlay = { ...overlayIn(site.folder), disk: 'vdb', base: image('vdb') }
  await createQcow2(overlay.base, MiB)
  await createOverlay(overlay)
  await qemuIo(overlay.overlay, 'qcow2', ['write -P 0x11 0 1M'])
  await vm.start()
  // No guest is there to let a disk go: what an unplugged one leaves is its place in the definition.
  const attach = ['attach-disk', vm.name, overlay.overlay, 'vdb', '--driver', 'qemu', '--subdriver', 'qcow2']
  await site.lab.virsh([...attach, '--config'])
  await site.host.commitOverlay(vm.name, overlay, UNMERGED)
  await qemuIo(overlay.base, 'qcow2', ['read -P 0x11 0 1M'])
  await expectGone(overlay.overlay)
  await vm.destroy()
  expect((await site.host.disks(vm.name)).disks).toMatchObject([{ name: 'vda' }, { path: overlay.base }])
})

test('an overlay stays where an instance made anew under its name, with another UUID, is on a file that rests on it', async () => {
  const vm = await createVm([{ target: 'vda', size: MiB }])
  const overlay = overlayIn(site.folder)
  await createOverlay(overlay)
  await qemuIo(overlay.overlay, 'qcow2', ['write -P 0x11 0 1M'])
  const theirs = join(site.folder, 'theirs')
  await createOverlay({ ...overlay, base: overlay.overlay, overlay: theirs })
  await site.lab.virsh(['define', await definitionOf(vm, [[image('vda'), theirs]])])
  const merging = site.host.commitOverlay(vm.name, overlay, { ...UNMERGED, uuid: randomUUID() })
  await expect(merging).rejects.toMatchObject({
    code: 'BLOCK_COMMIT_FAILED',
    message: expect.stringContaining(`writes to ${theirs}`),
  })
  await qemuIo(theirs, 'qcow2', ['read -P 0x11 0 1M'])
})

test('an overlay on another file system, whose times tell nothing, is merged for an instance that is gone unless its backup died before it had the time of the base', async () => {
  const overlay = overlayIn(elsewhere.path)
  const merging = (died: boolean, frozen?: FileState) =>
    site.host.commitOverlay('gone', overlay, { ...UNMERGED, died, ...(frozen && { frozen }) })
  await createQcow2(overlay.base, MiB)
  await createOverlay(overlay)
  await merging(true) // of what was never in use nothing can be lost
  await expectGone(overlay.overlay)
  await createOverlay(overlay)
  await qemuIo(overlay.overlay, 'qcow2', ['write -P 0x11 0 1M'])
  await expect(merging(true)).rejects.toMatchObject(stale)
  await qemuIo(overlay.base, 'qcow2', ['read -P 0 0 1M'])
  await merging(false)
  await qemuIo(overlay.base, 'qcow2', ['read -P 0x11 0 1M'])
  await expectGone(overlay.overlay)

  await createOverlay(overlay)
  await qemuIo(overlay.overlay, 'qcow2', ['write -P 0x22 0 1M'])
  await merging(true, await fileState(overlay.base))
  await qemuIo(overlay.base, 'qcow2', ['read -P 0x22 0 1M'])
  await expectGone(overlay.overlay)
})

test('a merge that was cut short, which makes the base the newer file, is done again, but not into another file', async () => {
  const overlay = overlayIn(site.folder)
  const steps: string[] = []
  const merging = (state: MergeRecord['state'], frozen?: FileState) =>
    site.host.commitOverlay('gone', overlay, {
      state,
      died: true,
      ...(frozen && { frozen }),
      record: async step => void steps.push(step),
    })
  await createQcow2(overlay.base, MiB)
  await createOverlay(overlay)
  await qemuIo(overlay.overlay, 'qcow2', ['write -P 0x11 0 1M'])
  const user = execa('qemu-io', ['-f', 'qcow2', overlay.base], { all: true })
  await once(user.all, 'data') // its prompt: it has the base open
  await expect(merging(undefined)).rejects.toMatchObject({
    code: 'BLOCK_COMMIT_FAILED',
    message: expect.stringContaining(`${overlay.base} is in use`),
  })
  expect(steps).toEqual([]) // nothing has been written to the base
  user.stdin.end('quit\n')
  await user
  await qemuIo(overlay.base, 'qcow2', ['write -P 0x11 0 512k'])
  await expect(merging(undefined)).rejects.toMatchObject(stale)
  expect(steps).toEqual([])
  const other = { identity: await fileIdentity(overlay.overlay), writtenAt: '1' }
  await expect(merging('merging', other)).rejects.toMatchObject(isOther)
  expect(steps).toEqual([])
  await merging('merging')
  expect(steps).toEqual(['merged'])
  await qemuIo(overlay.base, 'qcow2', ['read -P 0x11 0 1M'])
  await expectGone(overlay.overlay)
})
