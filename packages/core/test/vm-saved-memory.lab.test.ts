import { rename } from 'node:fs/promises'
import { join } from 'node:path'
import { qemuIo, sha256Content } from '@varve/testkit/lab'
import { execaSync } from 'execa'
import { expect, test } from 'vitest'
import { type RecoverReport, recover } from '../src/recover.ts'
import { MiB, useVmSite } from './vm-site.ts'

const site = useVmSite()
const { createVm, image, backup, restore, expectCleanHost } = site

const recoverNow = (): Promise<RecoverReport> =>
  recover({ stateDir: site.stateDir, storages: [site.storage] })

test('memory that is saved in the middle of a backup keeps its overlay until the instance runs again', async () => {
  const vm = await createVm([{ target: 'vda', size: 16 * MiB }])
  await vm.start()
  await vm.io('vda', 'write -P 0x11 0 2M')
  site.storage.beforePut = async key => {
    if (!key.endsWith('manifest.json')) return
    await vm.io('vda', 'write -P 0x22 4M 2M')
    await site.lab.virsh(['managedsave', vm.name])
  }
  const error = await backup().catch((reason: unknown) => reason)
  expect(error).toMatchObject({
    code: 'BLOCK_COMMIT_FAILED',
    message: expect.stringMatching(/managedsave.*start the instance first/),
    context: { published: expect.any(String) },
  })
  expect(await recoverNow()).toMatchObject({ ok: false, runs: [{ outcome: 'unresolved' }] })
  await vm.start()
  const holds = ['read -P 0x11 0 2M', 'read -P 0 2M 2M', 'read -P 0x22 4M 2M', 'read -P 0 6M 10M']
  await site.expectHolds('vda', ...holds)
  const report = await recoverNow()
  expect(report).toMatchObject({ ok: true, runs: [{ outcome: 'finished' }] })
  await expectCleanHost([`varve-${report.runs[0]?.id}`])
  await site.expectHolds('vda', ...holds)
  await vm.destroy()
  await qemuIo(image('vda'), 'qcow2', holds)
})

test('restored disks do not take the place of those that an instance was started on and saved its memory for', async () => {
  const vm = await createVm([{ target: 'vda', size: MiB }])
  const manifest = await backup()
  const wanted = await sha256Content(image('vda'), 'qcow2')
  await vm.start()
  const virsh = (command: string) => execaSync('virsh', ['--connect', site.lab.uri, command, vm.name])
  let swaps = 0
  const onEvent = (event: { type: string; stage?: string }) => {
    if (event.stage !== 'swap' || swaps++ > 0) return
    virsh('start')
    virsh('managedsave')
  }
  const request = { backup: manifest.id, to: { instance: vm.name }, powerOffTimeoutMs: 0 }
  const unresolved = { code: 'RUN_UNRESOLVED', message: expect.stringContaining('managedsave-remove') }
  await expect(restore(request, { onEvent })).rejects.toMatchObject(unresolved)
  expect(await recoverNow()).toMatchObject({ ok: false, runs: [{ error: unresolved }] })
  virsh('managedsave-remove')
  // QEMU has put the disk's bitmap back, which is a write.
  const written = { code: 'RUN_UNRESOLVED', message: expect.stringContaining('was written to') }
  expect(await recoverNow()).toMatchObject({ ok: false, runs: [{ error: written }] })
  await rename(image('vda'), join(site.folder, 'away'))
  expect(await recoverNow()).toMatchObject({ ok: true, runs: [{ outcome: 'finished' }] })
  expect(await vm.state()).toBe('running')
  await vm.destroy()
  expect(await sha256Content(image('vda'), 'qcow2')).toBe(wanted)
})
