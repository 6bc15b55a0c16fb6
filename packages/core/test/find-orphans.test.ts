import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, expect, test } from 'vitest'
import { VarveError } from '../src/errors.ts'
import type { VarveEvent } from '../src/events.ts'
import { findOrphans } from '../src/find-orphans.ts'
import type { Host } from '../src/host.ts'
import { MarkLedger } from '../src/mark-ledger.ts'
import type { RbdCluster } from '../src/rbd.ts'
import { MemoryStorage } from './memory-storage.ts'

let stateDir: string
beforeEach(async () => {
  stateDir = await mkdtemp(join(tmpdir(), 'varve-orphans-'))
})
afterEach(() => rm(stateDir, { recursive: true }))

const [ONE, TWO, THREE] = [1, 2, 3].map(n => `20250102-030405-00${n}-abcdef`) as [string, string, string]

/** A cluster with one pool `vms`, by the snapshots of its images. */
function cluster(address: string, images: Record<string, string[]>): RbdCluster {
  const found: Partial<RbdCluster> = {
    address,
    async snapshots(image) {
      if (!image.startsWith('vms/')) throw new VarveError('CEPH_POOL_NOT_FOUND', `no pool of ${image}`)
      return (images[image] ?? []).map((name, id) => ({ name, id }))
    },
    async imagesBeside() {
      return Object.keys(images)
    },
  }
  return found as RbdCluster
}

/** Instances that have backups, each with one disk on an image of a cluster. */
async function orphansOf(instances: Record<string, { image: string; cluster: RbdCluster }>) {
  const storage = new MemoryStorage()
  for (const [index, instance] of Object.keys(instances).entries())
    await new MarkLedger(stateDir, instance).add(`20250101-000000-00${index}-abcdef`, storage)
  const host: Partial<Host> = {
    async disks(name) {
      const disks = [{ name: 'vda', path: `rbd:${instances[name]?.image}` }]
      return { name, disks, primary: disks[0]?.name, unsupported: new Map() }
    },
    async rbd(disk) {
      const found = instances[disk?.instance ?? '']
      if (!found) throw new Error(`no cluster of ${disk?.instance}`)
      return found.cluster
    },
  }
  const events: VarveEvent[] = []
  const onEvent = (event: VarveEvent) => void events.push(event)
  const orphans = await findOrphans({ host: host as Host, storages: [storage], stateDir }, { onEvent })
  return { orphans, events }
}

test('images of the same name in two clusters are both looked at, and so are both pools', async () => {
  const first = cluster('10.0.0.1', { 'vms/disk': [`varve-${ONE}`] })
  const half = `vms/other.varve-restore-${THREE}`
  const second = cluster('10.0.0.2', { 'vms/disk': [`varve-${TWO}`], [half]: [] })
  const { orphans } = await orphansOf({
    a: { image: 'vms/disk', cluster: first },
    b: { image: 'vms/disk', cluster: second },
    c: { image: 'vms/disk', cluster: cluster('10.0.0.1', {}) }, // the first one once more
  })
  expect(orphans).toEqual([
    { image: 'vms/disk', snapshot: `varve-${ONE}`, run: ONE },
    { image: 'vms/disk', snapshot: `varve-${TWO}`, run: TWO },
    { image: half, run: THREE },
  ])
})

test('an image whose pool is gone is warned of, and the others are looked at', async () => {
  const one = cluster('10.0.0.1', { 'vms/disk': [`varve-${ONE}`] })
  const { orphans, events } = await orphansOf({
    a: { image: 'gone/disk', cluster: one },
    b: { image: 'vms/disk', cluster: one },
  })
  expect(orphans).toEqual([{ image: 'vms/disk', snapshot: `varve-${ONE}`, run: ONE }])
  expect(events).toEqual([{ type: 'warning', message: 'gone/disk is not looked at: no pool of gone/disk' }])
})
