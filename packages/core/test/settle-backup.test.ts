import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, expect, test } from 'vitest'
import { newBackupId } from '../src/backup-id.ts'
import { type ErrorCode, VarveError } from '../src/errors.ts'
import type { VarveEvent } from '../src/events.ts'
import type { DiskOverlay, Host } from '../src/host.ts'
import { ImageHost } from '../src/image-host.ts'
import { RunJournal } from '../src/journal.ts'
import type { RbdCluster } from '../src/rbd.ts'
import { settleBackup } from '../src/settle-backup.ts'

let folder: string
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'varve-settle-'))
})
afterEach(() => rm(folder, { recursive: true }))

/** The journal of a backup that has just begun. */
function beginJournal(host: ImageHost): Promise<RunJournal> {
  return RunJournal.begin(folder, {
    version: 1,
    id: newBackupId(),
    kind: 'backup',
    instance: 'web-1',
    host: host.reference,
    storage: { type: 'local', location: folder },
    disks: [],
    startedAt: new Date().toISOString(),
  })
}

/** A backup that was cut short once it had a snapshot of an RBD image, which cannot be removed. */
async function cutBackup(error: ErrorCode) {
  class WithoutSnapshot extends ImageHost {
    override async rbd() {
      const cluster: Partial<RbdCluster> = {
        async removeSnapshots() {
          throw new VarveError(error, 'vms/a is not to be had.')
        },
      }
      return cluster as RbdCluster
    }
  }
  const host = new WithoutSnapshot({ instance: 'web-1', disks: { vda: 'rbd:vms/a' } })
  const journal = await beginJournal(host)
  await journal.record({
    step: 'rbd-snapshot',
    snapshot: 'varve-mine',
    disks: [{ disk: 'vda', image: 'vms/a' }],
  })
  const warnings: string[] = []
  const onEvent = (event: VarveEvent) => void (event.type === 'warning' && warnings.push(event.message))
  return { settled: settleBackup(journal, { host, storage: undefined, run: { onEvent } }), warnings }
}

test.for<ErrorCode>(['CEPH_POOL_NOT_FOUND', 'RBD_SNAPSHOT_PROTECTED'])(
  'a backup whose snapshot cannot be removed (%s) is settled all the same, with a warning',
  async error => {
    const { settled, warnings } = await cutBackup(error)
    expect(await settled).toEqual({ published: false })
    expect(warnings).toEqual(['The snapshot varve-mine of vms/a is not removed: vms/a is not to be had.'])
    expect(await RunJournal.unsettled(folder)).toEqual([])
  },
)

test('a backup stays on record while its cluster does not answer', async () => {
  const { settled } = await cutBackup('CEPH_UNREACHABLE')
  await expect(settled).rejects.toMatchObject({ code: 'CEPH_UNREACHABLE' })
  expect(await RunJournal.unsettled(folder)).toHaveLength(1)
})

test('a server that cannot be cleared away keeps no overlay from being merged', async () => {
  const merged: DiskOverlay[] = []
  const commitOverlay: Host['commitOverlay'] = async (_instance, overlay) => void merged.push(overlay)
  const host = new ImageHost({ instance: 'web-1', disks: { vda: join(folder, 'vda') } })
  Object.assign(host, { commitOverlay })
  const journal = await beginJournal(host)
  const file = join(folder, 'file')
  await writeFile(file, '')
  const overlay = { disk: 'vda', base: '/vda', baseFormat: 'qcow2', overlay: '/vda.varve' } as const
  await journal.record({ step: 'snapshot', overlays: [overlay] })
  await journal.record({ step: 'export', folder: join(file, 'sockets') }) // a path that leads through a file
  await expect(settleBackup(journal, { host, storage: undefined, run: {} })).rejects.toMatchObject({
    code: 'NBD_FAILED',
    message: expect.stringContaining(`${file}/sockets`),
  })
  expect(merged).toEqual([overlay])
  expect(await RunJournal.unsettled(folder)).toHaveLength(1)
})
