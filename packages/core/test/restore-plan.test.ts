import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, expect, test } from 'vitest'
import { newBackupId } from '../src/backup-id.ts'
import { VarveError } from '../src/errors.ts'
import { ImageHost } from '../src/image-host.ts'
import type { RestoreRequest } from '../src/restore-pipeline.ts'
import { planRestore } from '../src/restore-plan.ts'
import { storeFake } from './fake-backup.ts'
import { MemoryStorage } from './memory-storage.ts'

let directory: string
beforeEach(async () => {
  directory = await mkdtemp(join(tmpdir(), 'varve-plan-'))
})
afterEach(() => rm(directory, { recursive: true }))

/** The targets of a restore of a backup with two disks, where no other instance is. */
async function targets(request: Omit<RestoreRequest, 'backup'>): Promise<string[]> {
  const id = newBackupId()
  const stored = await storeFake(new MemoryStorage(), { id, disks: ['vda', 'vdb'] })
  const host = new ImageHost({ instance: 'web-1', disks: {} })
  host.instance = async name => {
    throw new VarveError('INSTANCE_NOT_FOUND', `no ${name}`)
  }
  const { disks } = await planRestore({ backup: id, ...request }, stored, host, newBackupId(), {})
  return disks.map(({ target }) => target)
}

const copy = (name = 'copy') => ({ newInstance: name, directory })
const file = (name: string) => join(directory, name)

test('a new instance gets the disks that are chosen, each once, or all of them, but not none', async () => {
  expect(await targets({ to: copy() })).toEqual([file('copy-vda.qcow2'), file('copy-vdb.qcow2')])
  expect(await targets({ to: copy(), disks: ['vdb', 'vdb'] })).toEqual([file('copy-vdb.qcow2')])
  await expect(targets({ to: copy(), disks: [] })).rejects.toMatchObject({
    code: 'INVALID_ARGUMENT',
    message: expect.stringMatching(/^No disk was chosen for copy\. Name at least one/),
  })
})

test('files get the disks that are chosen, each once, and an error says what is missing', async () => {
  const to = { disks: { vda: file('a'), vdb: file('b') } }
  expect(await targets({ to })).toEqual([file('a'), file('b')])
  expect(await targets({ to, disks: ['vda', 'vda'] })).toEqual([file('a')])
  await expect(targets({ to: { disks: { vda: file('a') } }, disks: ['vdb'] })).rejects.toMatchObject({
    message: expect.stringMatching(/^No target was given for the disk vdb\. Name one .*--to-disk vdb=/),
  })
  await expect(targets({ to: copy('a/b') })).rejects.toMatchObject({
    message: expect.stringMatching(/^Not an instance name: a\/b\..*choose another/),
  })
})
