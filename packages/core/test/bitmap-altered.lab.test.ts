import { rename, rm } from 'node:fs/promises'
import { join } from 'node:path'
import { compareImages, qemuIo } from '@varve/testkit/lab'
import { execa } from 'execa'
import { expect, test } from 'vitest'
import { markName } from '../src/backup-plan.ts'
import { diskMark, twinOf } from '../src/bitmap-twin.ts'
import { countBitmapBits } from '../src/count-bitmap-bits.ts'
import type { BackupManifest } from '../src/manifest.ts'
import { MiB, useVmSite } from './vm-site.ts'

const site = useVmSite()
const { createVm, image, backup } = site

/** The bitmap that the next increment would be taken by. */
interface Marked {
  readonly node: string
  readonly name: string
}

/** Sends a command to QEMU's monitor. */
async function monitor(domain: string, command: string, args: object) {
  const json = JSON.stringify({ execute: command, arguments: args })
  const reply = JSON.parse(await site.lab.virsh(['qemu-monitor-command', domain, json]))
  expect(reply.error).toBeUndefined()
  return reply.return
}

/** The block node of a qcow2 image, and the names of its bitmaps. */
async function nodeOf(domain: string, path: string): Promise<{ name: string; bitmaps: string[] }> {
  const nodes: {
    'node-name': string
    drv: string
    file: string
    'dirty-bitmaps'?: { name: string }[]
  }[] = await monitor(domain, 'query-named-block-nodes', { flat: true })
  const node = nodes.find(({ drv, file }) => drv === 'qcow2' && file === path) ?? expect.fail()
  return { name: node['node-name'], bitmaps: (node['dirty-bitmaps'] ?? []).map(({ name }) => name) }
}

/** A backup must be what is on the disk of the instance, which is off. */
async function expectIsDisk(manifest: BackupManifest): Promise<void> {
  const stored = { path: site.stored(manifest, 'vda.qcow2'), format: 'qcow2' } as const
  const { identical, message } = await compareImages(stored, { path: image('vda'), format: 'qcow2' })
  expect(identical, message).toBe(true)
}

test('a bitmap that somebody changed in a running instance is not built on', async () => {
  const vm = await createVm([{ target: 'vda', size: 16 * MiB }])
  await vm.start()
  const qmp = (command: string, args: object) => monitor(vm.name, command, args)
  const guestWrites = (pattern: number, where: string) => vm.io('vda', `write -P ${pattern} ${where}`)
  const changes: Record<string, (marked: Marked) => Promise<unknown>> = {
    cleared: marked => qmp('block-dirty-bitmap-clear', marked),
    'stopped for a while': async marked => {
      await qmp('block-dirty-bitmap-disable', marked)
      await guestWrites(0x77, '9M 1M')
      await qmp('block-dirty-bitmap-enable', marked)
    },
  }

  let last = await backup()
  let pattern = 0x10
  for (const [what, change] of Object.entries(changes)) {
    pattern++
    await guestWrites(pattern, '1M 1M')
    const { name: node } = await nodeOf(vm.name, image('vda'))
    await change({ node, name: markName(last.id) })
    await guestWrites(pattern, '5M 1M')
    last = await backup({ type: 'incremental' })
    expect(last, what).toMatchObject({ kind: 'full', disks: [{ fallback: 'bitmap-altered' }] })
    const reads = ['1M 1M', '5M 1M'].map(where => `read -P ${pattern} ${where}`)
    await site.expectStored(last, reads)
    expect(site.events).toContainEqual(expect.objectContaining({ reason: 'bitmap-altered' }))
  }
  await guestWrites(0x33, '3M 1M')
  const next = await backup()
  expect(next).toMatchObject({ kind: 'incremental', parent: last.id })
  await site.expectCleanHost([markName(next.id)])
  await vm.destroy()
  await expectIsDisk(next)
})

test('a bitmap that somebody changed in a stopped instance is not built on, and one that misses nothing is', async () => {
  await createVm([{ target: 'vda', size: 16 * MiB }])
  const path = image('vda')
  const write = (command: string) => qemuIo(path, 'qcow2', [command])
  const bitmap = (action: string, name: string) =>
    execa('qemu-img', ['bitmap', action, '-f', 'qcow2', path, name])
  const listed = async () => {
    const { stdout } = await execa('qemu-img', ['info', '--output=json', path])
    const { bitmaps = [] } = JSON.parse(stdout)['format-specific'].data
    return bitmaps.map(({ name }: { name: string }) => name)
  }
  const altered = async (what: string) => {
    const next = await backup()
    expect(next, what).toMatchObject({ kind: 'full', disks: [{ fallback: 'bitmap-altered' }] })
    await expectIsDisk(next)
    await write('write -P 0x44 2M 1M')
    return markName(next.id)
  }
  let name = markName((await backup()).id)
  const mark = await diskMark('vda', path)
  const twin = () => twinOf(name, mark)
  expect(await listed()).toEqual([name, twin()])

  await write('write -P 0x11 1M 1M')
  await bitmap('--remove', name)
  await bitmap('--add', name)
  name = await altered('made anew')
  await bitmap('--remove', twin())
  name = await altered('without its twin')
  await bitmap('--disable', twin())
  name = await altered('with a twin that is stopped')
  await bitmap('--disable', name)
  const stopped = await backup()
  expect(stopped).toMatchObject({ disks: [{ fallback: 'bitmap-disabled' }] })
  await write('write -P 0x44 2M 1M')
  name = markName(stopped.id)
  expect(await listed()).toEqual([name, twin(), `${name}-seal`])

  // All that a twin has may have been cleared in the other before it was written again.
  await bitmap('--clear', name)
  await write('write -P 0x55 2M 1M')
  const next = await backup()
  expect(next).toMatchObject({ kind: 'incremental' })
  await expectIsDisk(next)

  // A twin that is left alone goes with the next backup.
  await bitmap('--remove', markName(next.id))
  const full = await backup()
  expect(full).toMatchObject({ disks: [{ fallback: 'bitmap-missing' }] })
  name = markName(full.id)
  expect(await listed()).toEqual([name, twin(), `${name}-seal`])
})

test('bitmaps that somebody cleared, or stopped for a while, all of them, are not built on', async () => {
  const vm = await createVm([{ target: 'vda', size: 16 * MiB }])
  const path = image('vda')
  /** All at once, as by a tool that knows none of them; gives what they are called. */
  const all = async (action: 'clear' | 'disable' | 'enable') => {
    if ((await vm.state()) === 'shut off') {
      const names = [...(await countBitmapBits(path)).keys()]
      for (const name of names) await execa('qemu-img', ['bitmap', `--${action}`, '-f', 'qcow2', path, name])
      return names
    }
    const { name: node, bitmaps } = await nodeOf(vm.name, path)
    const actions = bitmaps.map(name => ({ type: `block-dirty-bitmap-${action}`, data: { node, name } }))
    await monitor(vm.name, 'transaction', { actions })
    return bitmaps
  }
  const isAltered = async (what: string) => {
    const next = await backup()
    expect(next, what).toMatchObject({ kind: 'full', disks: [{ fallback: 'bitmap-altered' }] })
    return next
  }
  await vm.start()
  site.storage.beforePut = async key => {
    if (key.endsWith('vda.qcow2')) await vm.io('vda', 'write -P 0x11 1M 1M') // goes into the overlay
  }
  const first = await backup()
  const named = [markName(first.id), twinOf(markName(first.id), await diskMark('vda', path))]
  await vm.io('vda', 'write -P 0x22 2M 2M')
  expect((await all('clear')).sort()).toEqual([named[0], `${named[0]}-seal`, named[1]])
  const second = await isAltered('after a full backup')
  await site.expectStored(second, ['read -P 0x22 2M 2M'])

  site.storage.beforePut = undefined
  await vm.io('vda', 'write -P 0x33 3M 1M')
  const third = await backup()
  expect(third).toMatchObject({ kind: 'incremental', parent: second.id })
  await vm.io('vda', 'write -P 0x44 4M 1M')
  await all('clear')
  await vm.io('vda', 'write -P 0x55 5M 1M')
  const fourth = await isAltered('after an increment, with writes since')
  await site.expectStored(fourth, ['read -P 0x44 4M 1M', 'read -P 0x55 5M 1M'])

  for (const pattern of [0x66, 0x77]) {
    await vm.io('vda', `write -P ${pattern} 6M 1M`)
    expect(await backup()).toMatchObject({ kind: 'incremental' })
  }
  await all('disable')
  await vm.io('vda', 'write -P 0x88 8M 1M')
  await all('enable')
  const fifth = await isAltered('stopped for a while')
  await site.expectStored(fifth, ['read -P 0x88 8M 1M'])

  await vm.io('vda', 'write -P 0x99 9M 1M')
  await vm.destroy()
  expect(await backup()).toMatchObject({ kind: 'incremental', parent: fifth.id })
  await qemuIo(path, 'qcow2', ['write -P 0xaa 10M 1M'])
  expect(await all('clear')).toHaveLength(3)
  await expectIsDisk(await isAltered('of an instance that is off'))
})

test('a bitmap that somebody clears between the look at the disk and its freeze fails the backup', async () => {
  const vm = await createVm([{ target: 'vda', size: 16 * MiB }])
  await vm.start()
  const first = await backup()
  await vm.io('vda', 'write -P 0x11 1M 1M')
  site.storage.beforePut = async key => {
    if (!key.endsWith('domain.xml')) return
    const { name: node } = await nodeOf(vm.name, image('vda'))
    await monitor(vm.name, 'block-dirty-bitmap-clear', { node, name: markName(first.id) })
  }
  await expect(backup()).rejects.toMatchObject({ code: 'SNAPSHOT_FAILED', retryable: true })
  site.storage.beforePut = undefined
  await site.expectCleanHost([markName(first.id)])
  const next = await backup()
  expect(next).toMatchObject({ kind: 'full', disks: [{ fallback: 'bitmap-altered' }] })
  await site.expectStored(next, ['read -P 0x11 1M 1M'])
})

test('an overlay that somebody makes again under its name is not built on, though it has copies of all bitmaps', async () => {
  const vm = await createVm([{ target: 'vda', size: 16 * MiB }])
  await vm.start()
  const overlay = join(site.folder, 'nightly')
  const spec = `vda,snapshot=external,file=${overlay}`
  const snapshot = ['snapshot-create-as', vm.name, '--disk-only', '--no-metadata', '--diskspec', spec]
  await site.lab.virsh(snapshot)
  await vm.io('vda', 'write -P 0x11 1M 1M')
  const first = await backup()
  await vm.io('vda', 'write -P 0x22 2M 1M')
  expect(await backup()).toMatchObject({ kind: 'incremental', parent: first.id })

  await site.lab.virsh(['blockcommit', vm.name, 'vda', '--active', '--pivot', '--wait'])
  await rm(overlay)
  await vm.io('vda', 'write -P 0x33 3M 1M') // what no copy tells of
  await site.lab.virsh(snapshot)
  const next = await backup()
  expect(next).toMatchObject({ kind: 'full', disks: [{ fallback: 'disk-replaced' }] })
  await site.expectStored(next, ['read -P 0x33 3M 1M'])
})

test('disks whose files were exchanged while the instance was off are not taken for what they were once it runs', async () => {
  const vm = await createVm(['vda', 'vdb'].map(target => ({ target, size: MiB })))
  await vm.start()
  await vm.io('vda', 'write -P 0x11 0 64k')
  await backup()
  await vm.destroy()
  await rename(image('vda'), join(site.folder, 'between'))
  await rename(image('vdb'), image('vda'))
  await rename(join(site.folder, 'between'), image('vdb'))
  await vm.start()
  const next = await backup()
  expect(next.disks).toMatchObject([{ fallback: 'disk-replaced' }, { fallback: 'disk-replaced' }])
  await site.expectStored(next, ['read -P 0x11 0 64k'], 'vdb')
})

test('the bits of a bitmap in an image are as many as QEMU counts', async () => {
  const vm = await createVm([{ target: 'vda', size: 72 * 1024 * MiB + 512 }])
  const path = image('vda')
  for (const [name, granularity] of Object.entries({ fine: 512, coarse: 65_536, none: 4096 }))
    await execa('qemu-img', ['bitmap', '--add', '-g', String(granularity), '-f', 'qcow2', path, name])
  const writes = ['0 512', '1M 700k', '33G 1', '71G 300k', `${72 * 1024 * MiB} 512`]
  await qemuIo(
    path,
    'qcow2',
    writes.map(where => `write -z ${where}`),
  )
  await execa('qemu-img', ['bitmap', '--clear', '-f', 'qcow2', path, 'none'])
  const counted = await countBitmapBits(path)
  await vm.start()
  const query = JSON.stringify({ execute: 'query-named-block-nodes', arguments: { flat: true } })
  const reply = JSON.parse(await site.lab.virsh(['qemu-monitor-command', vm.name, query]))
  const nodes: {
    drv: string
    file: string
    'dirty-bitmaps'?: { name: string; count: number; granularity: number }[]
  }[] = reply.return
  const found = nodes.find(({ drv, file }) => drv === 'qcow2' && file === path)?.['dirty-bitmaps'] ?? []
  expect(Object.fromEntries(counted)).toEqual(
    Object.fromEntries(found.map(({ name, count, granularity }) => [name, count / granularity])),
  )
  expect(counted.get('none')).toBe(0)
  expect(counted.get('fine')).toBeGreaterThan(1900)
})
