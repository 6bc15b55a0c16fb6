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

/** A backup must be what is on the disk of the instance, which is off. */
async function expectIsDisk(manifest: BackupManifest): Promise<void> {
  const stored = { path: site.stored(manifest, 'vda.qcow2'), format: 'qcow2' } as const
  const { identical, message } = await compareImages(stored, { path: image('vda'), format: 'qcow2' })
  expect(identical, message).toBe(true)
}

test('a bitmap that somebody changed in a running instance is not built on', async () => {
  const vm = await createVm([{ target: 'vda', size: 16 * MiB }])
  await vm.start()
  const qmp = async (command: string, args: object) => {
    const json = JSON.stringify({ execute: command, arguments: args })
    const reply = JSON.parse(await site.lab.virsh(['qemu-monitor-command', vm.name, json]))
    expect(reply.error).toBeUndefined()
    return reply.return
  }
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
    const nodes: { 'node-name': string; drv: string; file: string }[] = await qmp(
      'query-named-block-nodes',
      {},
    )
    const node = nodes.find(({ drv, file }) => drv === 'qcow2' && file === image('vda'))
    await change({ node: node?.['node-name'] ?? expect.fail(), name: markName(last.id) })
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
  expect(await listed()).toEqual([name, twin()])

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
  expect(await listed()).toEqual([markName(full.id), twinOf(markName(full.id), mark)])
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
