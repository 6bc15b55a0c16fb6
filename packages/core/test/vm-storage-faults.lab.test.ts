import { type Fault, FaultyDriver } from '@varve/testkit'
import { expect, test } from 'vitest'
import { BackupPipeline } from '../src/backup-pipeline.ts'
import { type ErrorCode, VarveError } from '../src/errors.ts'
import { MiB, useVmSite } from './vm-site.ts'

// What the storage does to a backup whose instance runs meanwhile; all else that it may do, storage-faults.lab.test.ts has it do.

const site = useVmSite()

const lost = new VarveError('STORAGE_UNREACHABLE', 'The answer got lost.')
const full = new VarveError('STORAGE_FULL', 'There is no room.')

/** What goes wrong with the upload of an object, and what comes of it: none where the backup is there all the same. */
const FAULTS: readonly (readonly [key: string, Fault, ErrorCode | undefined])[] = [
  ['vda.qcow2', { kind: 'fail-at', offset: 100_000, error: full }, 'STORAGE_FULL'],
  ['vda.qcow2', { kind: 'stall-at', offset: 100_000 }, 'ABORTED'],
  ['manifest.json', { kind: 'stall' }, 'ABORTED'],
  ['manifest.json', { kind: 'fail-after', error: lost }, undefined],
]

test('whatever the storage does while the guest writes, its overlay is merged and the chain goes on', async () => {
  const vm = await site.createVm([{ target: 'vda', size: 8 * MiB }])
  await vm.start()
  await vm.io('vda', 'write -P 0x10 0 1M')
  let parent = (await site.backup()).id
  for (const [index, [key, fault, code]] of FAULTS.entries()) {
    const byte = 0x20 + index
    await vm.io('vda', `write -P ${byte} ${index}M 512k`)
    site.storage.beforePut = async stored => {
      if (stored.endsWith('vda.qcow2')) await vm.io('vda', `write -P ${byte} ${4 + index}M 512k`)
    }
    const giveUp = new AbortController()
    const storage = new FaultyDriver(site.storage, call => {
      if (call.operation !== 'put' || !call.key.endsWith(key)) return undefined
      if (fault.kind.startsWith('stall')) setTimeout(() => giveUp.abort(), 20) // once it stalls, or before
      return fault
    })
    const run = new BackupPipeline({ host: site.host, storage, stateDir: site.stateDir }).run(
      { instance: vm.name },
      { signal: giveUp.signal },
    )
    if (code !== undefined) await expect(run).rejects.toMatchObject({ code })
    else {
      const manifest = await run
      expect(manifest).toMatchObject({ kind: 'incremental', parent })
      parent = manifest.id
    }
    site.storage.beforePut = undefined
    expect(await vm.state()).toBe('running')
    await site.expectHolds('vda', `read -P ${byte} ${index}M 512k`, `read -P ${byte} ${4 + index}M 512k`)
    await site.expectCleanHost([`varve-${parent}`])
  }
  const next = await site.backup()
  expect(next).toMatchObject({ kind: 'incremental', parent })
  expect(await site.storedSums(next)).toEqual({ vda: await site.content('vda') })
})
