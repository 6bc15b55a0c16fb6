import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { expect, onTestFinished, test } from 'vitest'
import { BackupPipeline } from '../src/backup-pipeline.ts'
import { VarveError } from '../src/errors.ts'
import type { VarveEvent } from '../src/events.ts'
import { ImageHost } from '../src/image-host.ts'
import type { RbdCluster, RbdImage } from '../src/rbd.ts'
import { MemoryStorage } from './memory-storage.ts'

const GIB = 1024 ** 3

/** A cluster with one image of this size, which cannot be backed up from it. */
function clusterOf(size: number): RbdCluster {
  const state: RbdImage = { id: 'abc', size, snapshots: [], metadata: new Map(), objectMapInvalid: false }
  const gone = async () => {
    throw new VarveError('CEPH_UNREACHABLE', 'The cluster went away.')
  }
  const asked: Partial<RbdCluster> = {
    address: 'ceph',
    image: async () => state,
    isOpen: gone,
    snapshots: gone,
  }
  return asked as RbdCluster
}

async function warningsOf(size: number, maxStreamSize: number | undefined): Promise<string[]> {
  const stateDir = await mkdtemp(join(tmpdir(), 'varve-streams-'))
  onTestFinished(() => rm(stateDir, { recursive: true }))
  const storage = new MemoryStorage()
  const capabilities = { ...storage.capabilities, ...(maxStreamSize !== undefined && { maxStreamSize }) }
  const host = new ImageHost({
    instance: 'web-1',
    disks: { vda: 'rbd:vms/web-1' },
    rbd: { cluster: () => clusterOf(size) },
  })
  const events: VarveEvent[] = []
  const backups = new BackupPipeline({ host, storage: Object.assign(storage, { capabilities }), stateDir })
  const run = backups.run({ instance: 'web-1' }, { onEvent: event => events.push(event) })
  await expect(run).rejects.toMatchObject({ code: 'CEPH_UNREACHABLE' })
  return events.flatMap(event => (event.type === 'warning' ? [event.message] : []))
}

test('an RBD image that may be larger than what the storage takes of one is warned of first', async () => {
  const warning =
    /^The image vms\/web-1 of vda may have 1073741825 bytes.*more than 1073741824 of an RBD image/
  expect(await warningsOf(GIB + 1, GIB)).toEqual([expect.stringMatching(warning)])
})

test.each([
  ['of just that size', GIB],
  ['on a storage without such a limit', undefined],
])('an RBD image %s is not warned of', async (_, maxStreamSize) => {
  expect(await warningsOf(GIB, maxStreamSize)).toEqual([])
})
