import { createHash } from 'node:crypto'
import { mkdir, readdir, readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { LocalDriver } from '@varve/driver-local'
import {
  createQcow2,
  createRaw,
  type GuestWriter,
  qemuIo,
  sha256Content,
  writerBlockSize,
} from '@varve/testkit/lab'
import { execa } from 'execa'
import { expect, test } from 'vitest'
import { BackupPipeline } from '../src/backup-pipeline.ts'
import type { BackupManifest } from '../src/manifest.ts'
import { recover } from '../src/recover.ts'
import { RestorePipeline } from '../src/restore-pipeline.ts'
import { MiB, useVmSite } from './vm-site.ts'

const site = useVmSite()
const { createVm, image, backup, restore, content, sum, restoredSums, expectCleanHost } = site

/** Blocks of a disk restored to a raw file must be what a prefix of the writer's writes left; returns that prefix's length. */
async function consistentPrefix(writer: GuestWriter, path: string): Promise<number> {
  const bytes = await readFile(path)
  const digest = (content: Buffer) => createHash('sha256').update(content).digest('hex')
  const actual = new Map<number, string>()
  for (let block = 0; block * writerBlockSize < bytes.length; block++) {
    actual.set(block, digest(bytes.subarray(block * writerBlockSize, (block + 1) * writerBlockSize)))
  }
  const zero = digest(Buffer.alloc(writerBlockSize))
  const state = new Map([...actual.keys()].map(block => [block, zero]))
  let differing = [...actual].filter(([block, content]) => state.get(block) !== content).length
  if (differing === 0) return 0
  for (const write of await writer.writes()) {
    const was = state.get(write.block) === actual.get(write.block)
    state.set(write.block, digest(writer.content(write)))
    const is = state.get(write.block) === actual.get(write.block)
    differing += Number(was) - Number(is)
    if (differing === 0) return write.number
  }
  throw new Error("no prefix of the guest's writes is what the backup holds")
}

test('a guest that writes, zeroes and trims during full and incremental backups restores exactly', async () => {
  const vm = await createVm(
    [
      { target: 'vda', size: 32 * MiB },
      { target: 'vdb', size: 8 * MiB },
    ],
    { guest: true },
  )
  await vm.boot()
  await vm.run('dd if=/dev/urandom of=/dev/vda bs=1M count=24 conv=fsync')
  const writer = vm.startWriter({ device: '/dev/vdb', blocks: (8 * MiB) / writerBlockSize })
  await writer.waitForWrites(5)

  const sum1 = await sum('/dev/vda')
  const writesBefore = (await writer.writes()).length
  const full = await backup()
  expect(full).toMatchObject({ kind: 'full', consistency: 'crash', running: true })
  await expectCleanHost([`varve-${full.id}`])

  // The prefix that the guest had flushed before the backup is in it.
  await vm.run('dd if=/dev/urandom of=/dev/vda bs=64k count=40 seek=100 conv=fsync')
  await vm.run('dd if=/dev/zero of=/dev/vda bs=1M count=4 seek=10 conv=fsync')
  await vm.run('blkdiscard -o 16777216 -l 8388608 /dev/vda')
  const sum2 = await sum('/dev/vda')
  await writer.waitForWrites(5)
  const first = await backup({ type: 'incremental' })
  expect(first).toMatchObject({ kind: 'incremental', parent: full.id, chain: full.id })
  await expectCleanHost([`varve-${first.id}`])

  await vm.run('dd if=/dev/urandom of=/dev/vda bs=4k count=3 seek=2561 conv=fsync') // inside what was zeroed
  const sum3 = await sum('/dev/vda')
  await writer.waitForWrites(5)
  const second = await backup()
  expect(second).toMatchObject({ kind: 'incremental', parent: first.id, chain: full.id })

  // What was written during the backups is in the next one.
  const writes = await writer.stop()
  const sumB = await sum('/dev/vdb')
  const third = await backup()
  await expectCleanHost([`varve-${third.id}`])
  expect(writes.length).toBeGreaterThan(writesBefore)

  expect((await restoredSums(full)).vda).toBe(sum1)
  expect((await restoredSums(first)).vda).toBe(sum2)
  expect((await restoredSums(second)).vda).toBe(sum3)
  expect(await restoredSums(third)).toEqual({ vda: sum3, vdb: sumB })

  // Increments hold what was written, zeros too (the disk holds them as data), and not what was discarded.
  const stored = (manifest: BackupManifest) =>
    manifest.disks.find(disk => disk.name === 'vda')?.storedSize ?? 0
  expect(stored(full)).toBeGreaterThan(24 * MiB)
  expect(stored(first)).toBeGreaterThan(6.5 * MiB)
  expect(stored(first)).toBeLessThan(7.5 * MiB)
  expect(stored(second)).toBeLessThan(MiB)
})

test('each backup of disks under constant writes holds what the guest had flushed to all of them up to one moment', async () => {
  const vm = await createVm(
    [
      { target: 'vda', size: MiB },
      { target: 'vdb', size: 16 * MiB },
      { target: 'vdc', size: MiB },
    ],
    { guest: true },
  )
  await vm.boot()
  const writer = vm.startWriter({ device: '/dev/vdb', blocks: (16 * MiB) / writerBlockSize })
  // The same numbers to one disk after the other, each flushed before the next: of any moment, both have the same one, or the
  // first disk has one more.
  const numbers = vm.spawn(`number=0
    while [ ! -e /run/stop ]; do
      number=$((number + 1))
      for disk in vda vdc; do
        printf '%-512d' $number | dd of=/dev/$disk bs=512 count=1 iflag=fullblock conv=notrunc,fsync || exit 1
      done
      touch /run/begun
    done`)
  await vm.run('while [ ! -e /run/begun ]; do usleep 10000; done')
  let before = 0
  let last = 0
  for (const kind of ['full', 'incremental', 'incremental']) {
    before = (await writer.waitForWrites(4)).length
    const manifest = await backup()
    expect(manifest.kind).toBe(kind)
    const after = (await writer.writes()).length
    const path = (disk: string) => join(site.folder, `${manifest.id}-${disk}`)
    const disks = { vda: path('vda'), vdb: path('vdb'), vdc: path('vdc') }
    await restore({ backup: manifest.id, to: { disks, format: 'raw' } })
    const prefix = await consistentPrefix(writer, disks.vdb)
    expect(prefix).toBeGreaterThanOrEqual(before)
    expect(prefix).toBeLessThanOrEqual(after + 1)

    const numberOn = async (file: string) => Number((await readFile(file)).toString('latin1', 0, 512))
    const [first, second] = [await numberOn(disks.vda), await numberOn(disks.vdc)]
    expect([0, 1], `${first} on vda, ${second} on vdc`).toContain(first - second)
    expect(second).toBeGreaterThan(last) // the guest went on
    last = second
  }
  await vm.run('touch /run/stop')
  expect((await numbers.result).exitCode).toBe(0)
  await writer.stop()
})

test('a restore over the instance brings it back as it was, and the chain goes on without a full backup', async () => {
  const vm = await createVm([{ target: 'vda', size: 16 * MiB }], { guest: true })
  await vm.boot()
  await vm.run('dd if=/dev/urandom of=/dev/vda bs=1M count=8 conv=fsync')
  const full = await backup()
  await vm.run('dd if=/dev/urandom of=/dev/vda bs=1M count=4 seek=2 conv=fsync')
  const wanted = await sum('/dev/vda')
  const first = await backup()
  await vm.run('dd if=/dev/urandom of=/dev/vda bs=1M count=12 conv=fsync')
  await backup()

  const result = await restore({ backup: first.id, to: { instance: vm.name }, powerOffTimeoutMs: 30_000 })
  expect(result).toMatchObject({
    started: true,
    instance: vm.name,
    disks: [{ name: 'vda', path: image('vda') }],
  })
  await vm.waitForBoot()
  expect(await sum('/dev/vda')).toBe(wanted)
  await expectCleanHost([`varve-${first.id}`])

  await vm.run('dd if=/dev/urandom of=/dev/vda bs=64k count=2 seek=9 conv=fsync')
  const after = await sum('/dev/vda')
  const next = await backup()
  expect(next).toMatchObject({ kind: 'incremental', parent: first.id, chain: full.id })
  expect(await restoredSums(next)).toEqual({ vda: after })
})

test('a restore in place brings the instance back too, and the chain goes on', async () => {
  const vm = await createVm([{ target: 'vda', size: 16 * MiB }])
  await vm.start()
  await vm.io('vda', 'write -P 1 0 8M')
  const full = await backup()
  await vm.io('vda', 'write -P 2 4M 10M')
  await restore({ backup: full.id, to: { instance: vm.name }, inPlace: true, powerOffTimeoutMs: 0 })
  expect(await vm.state()).toBe('running')
  await site.expectHolds('vda', 'read -P 1 0 8M', 'read -P 0 8M 8M')
  await vm.io('vda', 'write -P 3 12M 128k')
  const after = await content('vda')
  const next = await backup()
  expect(next).toMatchObject({ kind: 'incremental', parent: full.id })
  expect(await restoredSums(next)).toEqual({ vda: after })
})

test('a stopped instance is backed up offline in the same chain', async () => {
  const vm = await createVm([{ target: 'vda', size: 16 * MiB }])
  await vm.start()
  await vm.io('vda', 'write -P 1 0 8M')
  const full = await backup()
  await vm.io('vda', 'write -P 2 3M 2M')
  await vm.destroy()
  const offline = await backup()
  expect(offline).toMatchObject({
    kind: 'incremental',
    parent: full.id,
    consistency: 'offline',
    running: false,
  })
  expect(await restoredSums(offline)).toEqual({ vda: await sha256Content(image('vda'), 'qcow2') })
  await vm.start()
  await vm.io('vda', 'write -P 3 14M 1M')
  const wanted = await content('vda')
  const again = await backup()
  expect(again).toMatchObject({ kind: 'incremental', parent: offline.id, running: true })
  expect(await restoredSums(again)).toEqual({ vda: wanted })
})

test('raw disks are backed up in full each time, with the reason, beside increments of the others', async () => {
  const vm = await createVm([
    { target: 'vda', size: 16 * MiB },
    { target: 'vdb', size: 16 * MiB, format: 'raw' },
  ])
  await vm.start()
  for (const disk of ['vda', 'vdb']) await vm.io(disk, 'write -P 1 0 3M')
  await backup()
  for (const disk of ['vda', 'vdb']) await vm.io(disk, 'write -P 2 2M 1M')
  const wanted = { vda: await content('vda'), vdb: await content('vdb') }
  const next = await backup()
  expect(next.disks).toMatchObject([{ kind: 'incremental' }, { kind: 'full', fallback: 'format-raw' }])
  expect(next.disks[1]).not.toHaveProperty('bitmap')
  expect(site.events).toContainEqual(
    expect.objectContaining({ type: 'fallback', disk: 'vdb', reason: 'format-raw' }),
  )
  expect(await restoredSums(next)).toEqual(wanted)
})

test('a missing bitmap makes a full backup and says so in the words that operators know', async () => {
  const vm = await createVm([{ target: 'vda', size: 16 * MiB }])
  await vm.start()
  const full = await backup()
  await site.host.removeBitmaps(vm.name, 'vda', [`varve-${full.id}`])
  const next = await backup({ type: 'incremental' })
  expect(next).toMatchObject({ kind: 'full', disks: [{ fallback: 'bitmap-missing' }] })
  expect(site.events).toContainEqual({
    type: 'fallback',
    disk: 'vda',
    reason: 'bitmap-missing',
    message: expect.stringContaining('Bitmap not found, falling back to full backup'),
  })
})

test('the guest agent freezes the file systems around the snapshot and thaws them', async () => {
  const vm = await createVm([{ target: 'vda', size: 64 * MiB }], { guest: true, agent: true })
  const raw = join(site.folder, 'raw')
  await createRaw(raw, 64 * MiB)
  await execa('mke2fs', ['-q', '-t', 'ext4', raw])
  await execa('qemu-img', ['convert', '-O', 'qcow2', raw, site.image('vda')])
  await vm.boot()
  await vm.run('mount -t ext4 /dev/vda /mnt && echo hello > /mnt/hello')
  const manifest = await backup({ freeze: 'require' })
  expect(manifest.consistency).toBe('filesystem')
  const expectThawed = async () => {
    const status = await site.lab.virsh([
      'qemu-agent-command',
      vm.name,
      '{"execute":"guest-fsfreeze-status"}',
    ])
    expect(JSON.parse(status)).toEqual({ return: 'thawed' })
    await vm.run('echo more >> /mnt/more && sync')
  }
  await expectThawed()
  // A mounted ext4 has its journal to be replayed, but not while it is frozen.
  const isFrozen = async (backup: BackupManifest) => {
    await execa('qemu-img', ['convert', '-O', 'raw', await site.restored(backup), raw])
    return !(await execa('dumpe2fs', ['-h', raw])).stdout.includes('needs_recovery')
  }
  expect(await isFrozen(manifest)).toBe(true)
  expect(await isFrozen(await backup())).toBe(false)

  // Somebody else's block job: libvirt takes no snapshot beside it.
  const copy = ['blockcopy', vm.name, 'vda', '--dest', join(site.folder, 'copy'), '--format', 'qcow2']
  await site.lab.virsh([...copy, '--transient-job', '--wait'])
  await expect(backup({ freeze: 'require' })).rejects.toMatchObject({ code: 'SNAPSHOT_FAILED' })
  await expectThawed()
})

test('without an agent a required freeze ends the backup and leaves no trace, a tried one is a warning', async () => {
  const vm = await createVm([{ target: 'vda', size: 16 * MiB }])
  await vm.start()
  await expect(backup({ freeze: 'require' })).rejects.toMatchObject({ code: 'FREEZE_FAILED' })
  await expectCleanHost([])
  expect(await readdir(site.storagePath)).toEqual([])
  expect(await backup({ freeze: 'try' })).toMatchObject({ consistency: 'crash' })
  expect(
    site.events.some(event => event.type === 'warning' && event.message.includes('crash-consistent')),
  ).toBe(true)
})

test('an aborted backup leaves the instance, its bitmaps and the storage as they were', async () => {
  const vm = await createVm([{ target: 'vda', size: 32 * MiB }])
  await vm.start()
  await vm.io('vda', 'write -P 1 0 8M')
  const full = await backup()
  await vm.io('vda', 'write -P 2 0 8M')
  const aborter = new AbortController()
  const running = backup(
    { bandwidth: MiB },
    {
      signal: aborter.signal,
      onEvent: event => {
        if (event.type === 'progress' && event.bytesDone > 0)
          aborter.abort(new Error('the operator pressed stop'))
      },
    },
  )
  await expect(running).rejects.toMatchObject({ code: 'ABORTED' })
  await expectCleanHost([`varve-${full.id}`])
  expect(await readdir(join(site.storagePath, vm.name, full.chain))).toEqual([full.id])

  const wanted = await content('vda')
  const next = await backup()
  expect(next).toMatchObject({ kind: 'incremental', parent: full.id })
  expect(await restoredSums(next)).toEqual({ vda: wanted })
})

test('one instance keeps a chain on each of two storages', async () => {
  const vm = await createVm([{ target: 'vda', size: 32 * MiB }])
  const secondPath = join(site.folder, 'second')
  await mkdir(secondPath)
  const second = new LocalDriver({ path: secondPath })
  const toSecond = () =>
    new BackupPipeline({ host: site.host, storage: second, stateDir: site.stateDir }).run({
      instance: vm.name,
    })
  await vm.start()
  const write = (at: number) => vm.io('vda', `write -P ${at} ${at}M 1M`)
  await write(1)
  const a1 = await backup()
  await write(2)
  const b1 = await toSecond()
  await write(3)
  const a2 = await backup()
  await write(4)
  const wanted = await content('vda')
  const b2 = await toSecond()
  expect([a2.parent, b2.parent]).toEqual([a1.id, b1.id])
  await expectCleanHost([`varve-${a2.id}`, `varve-${b2.id}`].sort())
  const target = join(site.folder, 'from-second.qcow2')
  await new RestorePipeline({ host: site.host, storage: second, stateDir: site.stateDir }).run({
    backup: b2.id,
    to: { disks: { vda: target } },
  })
  expect(await sha256Content(target, 'qcow2')).toBe(wanted)
})

test.each(['process', 'host'])(
  'a run whose %s died is settled by recover, and until then no backup starts',
  async died => {
    const vm = await createVm([{ target: 'vda', size: 32 * MiB }])
    await vm.start()
    await vm.io('vda', 'write -P 1 0 16M')
    const child = execa(
      process.execPath,
      ['--import', 'tsx', new URL('./die-mid-backup.ts', import.meta.url).pathname],
      {
        env: {
          VARVE_TEST: JSON.stringify({
            uri: site.lab.uri,
            storagePath: site.storagePath,
            stateDir: site.stateDir,
            instance: vm.name,
          }),
        },
        reject: false,
      },
    )
    expect((await child).signal).toBe('SIGKILL')
    expect((await readdir(site.folder)).some(name => name.includes('.varve-'))).toBe(true)
    await vm.io('vda', 'write -P 2 7M 2M') // to the overlay
    if (died === 'host') await site.lab.powerCycle()
    await expect(backup()).rejects.toMatchObject({
      code: expect.stringMatching(/RUN_UNRESOLVED|OVERLAY_LEFT_OVER/),
    })

    const report = await recover({ stateDir: site.stateDir, storages: [site.storage] })
    expect(report).toMatchObject({ ok: true, runs: [{ kind: 'backup', outcome: 'undone' }] })
    await expectCleanHost([])
    if (died === 'host') await vm.start()
    const wanted = await content('vda')
    expect(await restoredSums(await backup())).toEqual({ vda: wanted })
    await vm.destroy()
    const expected = join(site.folder, 'expected')
    await createQcow2(expected, 32 * MiB)
    await qemuIo(expected, 'qcow2', ['write -P 1 0 16M', 'write -P 2 7M 2M'])
    expect(await sha256Content(expected, 'qcow2')).toBe(wanted)
  },
)
