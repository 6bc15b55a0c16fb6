import { mkdir, readdir } from 'node:fs/promises'
import { join } from 'node:path'
import { LocalDriver } from '@varve/driver-local'
import { sha256Content } from '@varve/testkit/lab'
import { execa } from 'execa'
import { expect, test } from 'vitest'
import { BackupPipeline } from '../src/backup-pipeline.ts'
import { recover } from '../src/recover.ts'
import { MiB, useVmSite } from './vm-site.ts'

const site = useVmSite()
const { createVm, image, backup, restore, content, storedSums, expectCleanHost } = site

test('a restore over the instance brings it back as it was, and the chain goes on without a full backup', async () => {
  const vm = await createVm([{ target: 'vda', size: 16 * MiB }])
  await vm.start()
  await vm.io('vda', 'write -P 1 0 8M')
  const full = await backup()
  await vm.io('vda', 'write -P 2 2M 4M')
  const wanted = ['read -P 1 0 2M', 'read -P 2 2M 4M', 'read -P 1 6M 2M', 'read -P 0 8M 8M']
  const first = await backup()
  await vm.io('vda', 'write -P 3 0 12M')
  await backup()

  const result = await restore({ backup: first.id, to: { instance: vm.name }, powerOffTimeoutMs: 0 })
  expect(result).toMatchObject({
    started: true,
    instance: vm.name,
    disks: [{ name: 'vda', path: image('vda') }],
  })
  expect(await vm.state()).toBe('running')
  await site.expectHolds('vda', ...wanted)
  await expectCleanHost([`varve-${first.id}`])

  await vm.io('vda', 'write -P 4 9M 128k')
  const next = await backup()
  expect(next).toMatchObject({ kind: 'incremental', parent: first.id, chain: full.id })
  await site.expectStored(next, [...wanted.slice(0, 3), 'read -P 4 9M 128k'])
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
  expect(await storedSums(next)).toEqual({ vda: after })
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
  expect(await storedSums(offline)).toEqual({ vda: await sha256Content(image('vda'), 'qcow2') })
  await vm.start()
  await vm.io('vda', 'write -P 3 14M 1M')
  const wanted = await content('vda')
  const again = await backup()
  expect(again).toMatchObject({ kind: 'incremental', parent: offline.id, running: true })
  expect(await storedSums(again)).toEqual({ vda: wanted })
})

test('raw disks, and those whose bitmap is missing, are backed up in full, with the reason, beside increments of the others', async () => {
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
  expect(await storedSums(next)).toEqual(wanted)

  const disk = { name: 'vda', path: site.image('vda') }
  await site.host.changeBitmaps(vm.name, [{ disk, remove: [`varve-${next.id}`] }])
  const again = await backup({ type: 'incremental' })
  expect(again).toMatchObject({
    kind: 'full',
    disks: [{ fallback: 'bitmap-missing' }, { fallback: 'format-raw' }],
  })
  expect(site.events).toContainEqual({
    type: 'fallback',
    disk: 'vda',
    reason: 'bitmap-missing',
    message: expect.stringContaining('Bitmap not found, falling back to full backup'),
  })
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
  expect(await storedSums(next)).toEqual({ vda: wanted })
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
  const stored = join(secondPath, vm.name, b2.chain, b2.id, 'vda.qcow2')
  expect(await sha256Content(stored, 'qcow2')).toBe(wanted)
})

test('a run whose host died is settled by recover, and until then no backup starts', async () => {
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
  await site.lab.powerCycle()
  await expect(backup()).rejects.toMatchObject({
    code: expect.stringMatching(/RUN_UNRESOLVED|OVERLAY_LEFT_OVER/),
  })

  const report = await recover({ stateDir: site.stateDir, storages: [site.storage] })
  expect(report).toMatchObject({ ok: true, runs: [{ kind: 'backup', outcome: 'undone' }] })
  await expectCleanHost([])
  await vm.start()
  const reads = ['read -P 1 0 7M', 'read -P 2 7M 2M', 'read -P 1 9M 7M', 'read -P 0 16M 16M']
  await site.expectStored(await backup(), reads)
  await site.expectHolds('vda', ...reads)
})
