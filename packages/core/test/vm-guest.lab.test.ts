import { createHash } from 'node:crypto'
import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import {
  checkQcow2,
  createRaw,
  type GuestWrite,
  type GuestWriter,
  type LabDomain,
  sha256Content,
  sha256File,
  writerBlockSize,
} from '@varve/testkit/lab'
import { thoroughTest } from '@varve/testkit/thorough'
import { execa } from 'execa'
import { beforeAll, expect, test } from 'vitest'
import { newBackupId } from '../src/backup-id.ts'
import type { VarveEvent } from '../src/events.ts'
import { RunJournal } from '../src/journal.ts'
import type { BackupManifest } from '../src/manifest.ts'
import { recover } from '../src/recover.ts'
import { MiB, useVmSite } from './vm-site.ts'

// What only a guest that has booted can show. A boot takes longer than a test: they share one guest, in this order.
const site = useVmSite('file')
const { image, backup, restore, sum, restoredSums, storedSums, expectCleanHost } = site
// Small, as it takes an emulated guest seconds to digest some MiB.
const DISKS = { vda: 12 * MiB, vdb: 4 * MiB, vdc: MiB }
const FIRST = ['vda']

let vm: LabDomain
beforeAll(async () => {
  const disks = Object.entries(DISKS).map(([target, size]) => ({ target, size }))
  vm = await site.createVm(disks, { guest: true, agent: true })
  const raw = join(site.folder, 'raw')
  await createRaw(raw, DISKS.vda)
  await execa('mke2fs', ['-q', '-t', 'ext4', raw])
  await execa('qemu-img', ['convert', '-O', 'qcow2', raw, image('vda')])
  await vm.boot()
})

/** Has the guest write random bytes to vda. */
const write = (at: number, count: number) =>
  vm.run(`dd if=/dev/urandom of=/dev/vda bs=1M count=${count} seek=${at} conv=fsync`)

test('the guest agent freezes the file systems around the snapshot and thaws them', async () => {
  await vm.run('mount -t ext4 /dev/vda /mnt && echo hello > /mnt/hello')
  const manifest = await backup({ freeze: 'require', disks: FIRST })
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
  const raw = join(site.folder, 'raw')
  const isFrozen = async (backup: BackupManifest) => {
    await execa('qemu-img', ['convert', '-O', 'raw', await site.restored(backup), raw])
    return !(await execa('dumpe2fs', ['-h', raw])).stdout.includes('needs_recovery')
  }
  expect(await isFrozen(manifest)).toBe(true)
  expect(await isFrozen(await backup({ disks: FIRST }))).toBe(false)

  // Somebody else's block job: libvirt takes no snapshot beside it.
  const copy = ['blockcopy', vm.name, 'vda', '--dest', join(site.folder, 'copy'), '--format', 'qcow2']
  await site.lab.virsh([...copy, '--transient-job', '--wait'])
  await expect(backup({ freeze: 'require', disks: FIRST })).rejects.toMatchObject({ code: 'SNAPSHOT_FAILED' })
  await site.lab.virsh(['blockjob', vm.name, 'vda', '--abort'])
  await expectThawed()
  await vm.run('umount /mnt')
})

/** Blocks of a disk restored to a raw file, but the first, must be what a prefix of the writer's writes left; returns its length. */
async function consistentPrefix(
  writer: GuestWriter,
  writes: readonly GuestWrite[],
  path: string,
): Promise<number> {
  const bytes = await readFile(path)
  const digest = (content: Buffer) => createHash('sha256').update(content).digest('hex')
  const actual = new Map<number, string>()
  for (let block = 1; block * writerBlockSize < bytes.length; block++) {
    actual.set(block, digest(bytes.subarray(block * writerBlockSize, (block + 1) * writerBlockSize)))
  }
  const zero = digest(Buffer.alloc(writerBlockSize))
  const state = new Map([...actual.keys()].map(block => [block, zero]))
  let differing = [...actual].filter(([block, content]) => state.get(block) !== content).length
  if (differing === 0) return 0
  for (const write of writes) {
    const was = state.get(write.block) === actual.get(write.block)
    state.set(write.block, digest(writer.content(write)))
    const is = state.get(write.block) === actual.get(write.block)
    differing += Number(was) - Number(is)
    if (differing === 0) return write.number
  }
  throw new Error("no prefix of the guest's writes is what the backup holds")
}

test('each backup of a guest that writes, zeroes and trims holds what it had flushed to all disks up to one moment', async () => {
  const writer = vm.startWriter({
    device: '/dev/vdb',
    firstBlock: 1,
    blocks: DISKS.vdb / writerBlockSize - 1,
  })
  // The same numbers to one disk after the other, each flushed before the next: of any moment, both have the same one, or the
  // first disk has one more.
  const numbers = vm.spawn(`number=0
    while [ ! -e /run/stop ]; do
      number=$((number + 1))
      for disk in vdb vdc; do
        printf '%-512d' $number | dd of=/dev/$disk bs=512 count=1 iflag=fullblock conv=notrunc,fsync || exit 1
      done
      touch /run/begun
      usleep 100000 # leaves the processor to others
    done`)
  await vm.run('while [ ! -e /run/begun ]; do usleep 10000; done')
  const rounds = [
    { type: 'full', commands: ['dd if=/dev/urandom of=/dev/vda bs=1M count=9 conv=fsync'] },
    {
      type: 'incremental',
      commands: [
        'dd if=/dev/urandom of=/dev/vda bs=64k count=10 seek=100 conv=fsync',
        'dd if=/dev/zero of=/dev/vda bs=1M count=1 seek=3 conv=fsync',
        'blkdiscard -o 4194304 -l 2097152 /dev/vda',
      ],
    },
    {
      type: 'auto',
      commands: ['dd if=/dev/urandom of=/dev/vda bs=4k count=3 seek=769 conv=fsync'], // inside what was zeroed
    },
  ] as const
  const taken: { manifest: BackupManifest; wanted: string; before: number; after: number }[] = []
  for (const { type, commands } of rounds) {
    await vm.run(commands.join(' && '))
    const wanted = await sum('/dev/vda')
    const before = (await writer.waitForWrites(4)).length
    const manifest = await backup({ type })
    taken.push({ manifest, wanted, before, after: (await writer.writes()).length })
  }
  const [full, next, second] = taken.map(({ manifest }) => manifest)
  expect(full).toMatchObject({ kind: 'full', consistency: 'crash', running: true })
  expect(next).toMatchObject({ kind: 'incremental', parent: full?.id, chain: full?.id })
  expect(second).toMatchObject({ kind: 'incremental', parent: next?.id, chain: full?.id })

  // What was written during the backups is in the next one.
  await vm.run('touch /run/stop')
  expect((await numbers.result).exitCode).toBe(0)
  const writes = await writer.stop()
  const sums = { vda: taken.at(-1)?.wanted, vdb: await sum('/dev/vdb') }
  const third = await backup()
  await expectCleanHost([`varve-${third.id}`])
  expect(await restoredSums(third)).toMatchObject(sums)
  expect(await storedSums(third)).toMatchObject(sums)

  let last = 0
  for (const { manifest, wanted, before, after } of taken) {
    const path = (disk: string) => join(site.folder, `${manifest.id}-${disk}`)
    const disks = Object.fromEntries(Object.keys(DISKS).map(disk => [disk, path(disk)]))
    await restore({ backup: manifest.id, to: { disks, format: 'raw' } })
    expect(await sha256File(path('vda'))).toBe(wanted)
    const prefix = await consistentPrefix(writer, writes, path('vdb'))
    expect(prefix).toBeGreaterThanOrEqual(before)
    expect(prefix).toBeLessThanOrEqual(after + 1)

    const numberOn = async (file: string) => Number((await readFile(file)).toString('latin1', 0, 512))
    const [first, second] = [await numberOn(path('vdb')), await numberOn(path('vdc'))]
    expect([0, 1], `${first} on vdb, ${second} on vdc`).toContain(first - second)
    expect(second).toBeGreaterThan(last) // the guest went on
    last = second
  }
  for (const disk of Object.keys(DISKS)) await checkQcow2(site.stored(third, `${disk}.qcow2`))

  // Increments hold what was written, zeros too (the disk holds them as data), and not what was discarded.
  const stored = (manifest: BackupManifest | undefined) =>
    manifest?.disks.find(disk => disk.name === 'vda')?.storedSize ?? 0
  expect(stored(full)).toBeGreaterThan(9 * MiB)
  expect(stored(next)).toBeGreaterThan(1.6 * MiB)
  expect(stored(next)).toBeLessThan(2.2 * MiB)
  expect(stored(second)).toBeLessThan(MiB / 2)
})

thoroughTest(
  'an instance with its memory saved is backed up as after a power cut, and goes on from that memory',
  async () => {
    const before = await backup({ disks: FIRST })
    await write(3, 2)
    await vm.run('echo here > /run/mark')
    await site.lab.virsh(['managedsave', vm.name])
    const saved = await backup({ disks: FIRST })
    expect(saved).toMatchObject({ parent: before.id, running: false, consistency: 'crash' })
    expect(site.events).toContainEqual({
      type: 'warning',
      message: expect.stringMatching(/memory saved.*crash-consistent/),
    })
    const untouched = await sha256File(image('vda'))
    expect(await storedSums(saved)).toEqual({ vda: await sha256Content(image('vda'), 'qcow2') })
    const request = { backup: before.id, to: { instance: vm.name } }
    for (const inPlace of [false, true]) {
      await expect(restore({ ...request, inPlace })).rejects.toMatchObject({
        code: 'MEMORY_SAVED',
        message: expect.stringContaining(`virsh managedsave-remove ${vm.name}`),
      })
    }
    expect(await sha256File(image('vda'))).toBe(untouched)

    await vm.start()
    expect((await vm.run('cat /run/mark')).stdout).toBe('here')
    await write(6, 2)
    const wanted = await sum('/dev/vda')
    const next = await backup({ disks: FIRST })
    expect(next).toMatchObject({ kind: 'incremental', parent: saved.id, running: true, consistency: 'crash' })
    expect(await storedSums(next)).toEqual({ vda: wanted })
  },
)

thoroughTest('a restore that is given up while the guest shuts down has it run again', async () => {
  const pid = await vm.qemuPid()
  const manifest = await backup({ disks: FIRST })
  const given = new AbortController()
  const onEvent = (event: VarveEvent) => {
    if (event.type === 'command' && event.args.includes('shutdown')) given.abort(new Error('enough'))
  }
  await expect(
    restore({ backup: manifest.id, to: { instance: vm.name } }, { signal: given.signal, onEvent }),
  ).rejects.toMatchObject({ code: 'ABORTED' })
  expect(await vm.state()).toBe('running')
  expect(await vm.qemuPid()).not.toBe(pid)
  await expectCleanHost([`varve-${manifest.id}`], FIRST)
  await vm.waitForBoot()
})

test('a guest that shuts down slowly for a restore whose process died runs again after recover', async () => {
  const slow = '#!/bin/sh\nwhile [ ! -e /run/go ]; do usleep 50000; done\nexec poweroff -f'
  await vm.run(`rm /sbin/shutdown; echo '${slow}' > /sbin/shutdown; chmod +x /sbin/shutdown`)
  const pid = await vm.qemuPid()
  const disks = [{ name: 'vda', path: image('vda') }]
  const journal = await RunJournal.begin(site.stateDir, {
    ...{ version: 1, id: newBackupId(), kind: 'restore', instance: vm.name, disks },
    host: site.host.reference,
    storage: { type: site.storage.type, location: site.storage.location },
    startedAt: new Date().toISOString(),
  })
  await journal.record({
    ...{ step: 'power-off', instance: vm.name, wasRunning: true, start: true },
    timeoutMs: 60_000,
  })
  await site.lab.virsh(['shutdown', vm.name, '--mode', 'acpi'])
  let looks = 0
  const onEvent = (event: VarveEvent) => {
    if (event.type === 'command' && event.args.some(arg => arg.includes('domstate'))) looks += 1
    if (looks === 3) vm.spawn('touch /run/go')
  }
  const report = await recover({ stateDir: site.stateDir, storages: [site.storage] }, { onEvent })
  expect(report).toMatchObject({ ok: true, runs: [{ outcome: 'undone' }] })
  expect(await vm.state()).toBe('running')
  expect(await vm.qemuPid()).not.toBe(pid)
  await expectCleanHost([], [])
  await vm.waitForBoot()
})

test('a guest that reboots in the middle of a backup goes on on its overlay, which is merged', async () => {
  await write(0, 4)
  const wanted = await sum('/dev/vda')
  const bootId = async () => {
    // What is said to it while it reboots may be lost.
    const asked = await vm
      .run('cat /proc/sys/kernel/random/boot_id', { timeoutMs: 2_000 })
      .catch(() => undefined)
    return asked?.stdout
  }
  const before = await bootId()
  site.storage.beforePut = async key => {
    if (!key.endsWith('/vda.qcow2')) return
    site.storage.beforePut = undefined
    await write(2, 3)
    vm.spawn('reboot -f').result.catch(() => undefined) // it does not answer any more
    await expect
      .poll(async () => ![undefined, before].includes(await bootId()), { timeout: 100_000 })
      .toBe(true)
    await write(8, 2)
  }
  const manifest = await backup({ disks: FIRST })
  expect(manifest).toMatchObject({ consistency: 'crash', running: true })
  await expectCleanHost([`varve-${manifest.id}`], FIRST)
  expect(await storedSums(manifest)).toEqual({ vda: wanted })
  await write(5, 1)
  const last = await sum('/dev/vda')
  expect(last).not.toBe(wanted)
  const next = await backup({ disks: FIRST })
  expect(next).toMatchObject({ kind: 'incremental', parent: manifest.id })
  expect(await storedSums(next)).toEqual({ vda: last })
})

thoroughTest(
  'a guest that shuts itself down in the middle of a backup has what it wrote until then on its disk',
  async () => {
    await write(0, 8)
    const wanted = await sum('/dev/vda')
    let last = ''
    site.storage.beforePut = async key => {
      if (!key.endsWith('/vda.qcow2')) return
      site.storage.beforePut = undefined
      await write(6, 3)
      last = await sum('/dev/vda')
      vm.spawn('/sbin/shutdown')
      await vm.waitForState('shut off')
    }
    const manifest = await backup({ disks: FIRST })
    expect(manifest).toMatchObject({ consistency: 'crash', running: true })
    expect(await vm.state()).toBe('shut off')
    await expectCleanHost([`varve-${manifest.id}`], FIRST)
    expect(last).not.toBe(wanted)
    expect(await storedSums(manifest)).toEqual({ vda: wanted })
    expect(await sha256Content(image('vda'), 'qcow2')).toBe(last)
    const next = await backup({ disks: FIRST })
    expect(next).toMatchObject({ kind: 'incremental', parent: manifest.id, consistency: 'offline' })
    expect(await storedSums(next)).toEqual({ vda: last })
  },
)
