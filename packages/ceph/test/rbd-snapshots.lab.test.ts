import { cp, readFile, rm } from 'node:fs/promises'
import { join } from 'node:path'
import {
  type BackupManifest,
  BackupPipeline,
  ChainManager,
  findOrphans,
  RestorePipeline,
  type StorageDriver,
} from '@varve/core'
import { LocalDriver } from '@varve/driver-local'
import { thoroughTest } from '@varve/testkit/thorough'
import { execa } from 'execa'
import { afterAll, beforeAll, expect, test, vi } from 'vitest'
import { newBackupId } from '../../core/src/backup-id.ts'
import { DiskLock } from '../../core/src/disk-lock.ts'
import { RunJournal } from '../../core/src/journal.ts'
import { Random } from '../../core/test/torture/random.ts'
import { CephConnector } from '../src/index.ts'
import { ModelDisk } from './model-disk.ts'
import { expectSame, RbdInstance } from './rbd-instance.ts'
import { RbdSite } from './rbd-site.ts'

const MIB = 1024 ** 2
const SEED = 20261127
const BACKUPS = 3

let site: RbdSite
beforeAll(async () => {
  site = await RbdSite.start()
})
afterAll(() => site[Symbol.asyncDispose]())

const snapshots = (image: string) => site.snapshots(image)

thoroughTest(
  'chains on two storages, side by side, hold what random changes, of the size too, left at each backup',
  async () => {
    const random = new Random(SEED)
    const image = await site.create(3 * MIB, '--object-size', '512K')
    const disk = new ModelDisk(site, { image, size: 3 * MIB, resizeOneIn: 2 }, random)
    const web = await RbdInstance.of(site, `rbd:${image}`)
    const { host, stateDir, storage } = web.parts()
    const storages: StorageDriver[] = [
      storage,
      new LocalDriver({ path: join(web.folder, 'other'), create: true }),
    ]
    const taken = storages.map(() => [] as { manifest: BackupManifest; bytes: Buffer }[])

    for (let step = 0; step < BACKUPS; step++) {
      for (const [index, storage] of storages.entries()) {
        await disk.change()
        const manifest = await new BackupPipeline({ host, storage, stateDir }).run({ instance: 'web-1' })
        expect(manifest.kind, `seed ${SEED}, step ${step}`).toBe(step === 0 ? 'full' : 'incremental')
        taken[index]?.push({ manifest, bytes: Buffer.from(disk.bytes) })
      }
    }
    // The model itself is right.
    expectSame(await site.bytes(image), disk.bytes)
    const kept = taken.flatMap(backups => backups.slice(-2).map(({ manifest }) => `varve-${manifest.id}`))
    expect(await snapshots(image)).toEqual(kept.sort())

    for (const [index, storage] of storages.entries()) {
      const pipeline = new RestorePipeline({ host, storage, stateDir })
      for (const { manifest, bytes } of taken[index] ?? []) {
        const path = join(web.folder, manifest.id)
        await pipeline.run({ backup: manifest.id, to: { disks: { vda: path }, format: 'raw' } })
        const what = `seed ${SEED}: ${manifest.id}`
        expect(Buffer.compare(await readFile(path), bytes), what).toBe(0)
      }
      const newest = taken[index]?.at(-1)
      const report = await new ChainManager({ storage }).verify(newest?.manifest.id ?? '', { deep: true })
      expect(report).toMatchObject({ ok: true, chain: { length: BACKUPS } })
    }
  },
)

test('the snapshot of a backup that is deleted or pruned goes with it, or with the next backup, where it has to stay', async () => {
  const image = await site.create(MIB)
  const disk = `rbd:${image}`
  const web = await RbdInstance.of(site, disk)
  const { chains, run } = web
  const full = await web.backup()
  const second = await web.backup()
  // The cluster cannot be reached.
  const away = new CephConnector({ conf: '/dev/null', monitors: ['127.0.0.1:1'], timeoutMs: 1000 })
  await new ChainManager(web.parts(away)).delete(second.id, run)
  expect(web.warnings()).toEqual([
    expect.stringContaining(`varve-${second.id} of the RBD image ${image} stays`),
  ])
  expect(await snapshots(image)).toEqual([`varve-${full.id}`, `varve-${second.id}`])
  await site.write(image, 'write -P 1 0 64k')
  const third = await web.backup()
  expect([third.kind, third.parent]).toEqual(['incremental', full.id])
  expect(await snapshots(image)).toEqual([`varve-${full.id}`, `varve-${third.id}`])
  expectSame(await web.restored(third), await site.bytes(image))

  web.events.length = 0
  {
    await using _run = await DiskLock.acquire([disk])
    await chains.delete(third.id, run)
  }
  expect(web.warnings()).toHaveLength(1)
  expect(await snapshots(image)).toContain(`varve-${third.id}`)
  const other = await web.backup({ type: 'full', rbdSnapshots: 9 })
  const last = await web.backup({ rbdSnapshots: 9 })
  expect(await snapshots(image)).toEqual([full, other, last].map(({ id }) => `varve-${id}`))

  web.events.length = 0
  await chains.delete(last.id, run)
  const left = [full, other].map(({ id }) => `varve-${id}`)
  expect(await snapshots(image)).toEqual(left)
  await chains.prune({ keepLast: 1 }, { dryRun: true })
  expect(await snapshots(image)).toEqual(left)
  expect((await chains.prune({ keepLast: 1 }, run)).removed).toHaveLength(1)
  expect(await snapshots(image)).toEqual([`varve-${other.id}`])
  expect(web.warnings()).toEqual([])
})

test('a backup that is copied, or forged, to another storage does not take the snapshot of its original along', async () => {
  const image = await site.create(MIB)
  const web = await RbdInstance.of(site, `rbd:${image}`)
  const { id, chain } = await web.backup()
  const other = new LocalDriver({ path: join(web.folder, 'other'), create: true })
  const options = { ...web.parts(), storage: other }
  await new BackupPipeline(options).run({ instance: 'web-1' })
  const place = join('web-1', chain, id)
  const copy = () => cp(join(web.storage.location, place), join(other.location, place), { recursive: true })
  const chains = new ChainManager(options)
  await copy()
  await chains.delete(id, web.run)
  expect(web.warnings()).toEqual([expect.stringContaining(`that backup went to ${web.storage.location}`)])
  expect(await snapshots(image)).toContain(`varve-${id}`)
  expect((await web.backup()).parent).toBe(id)

  // Nor one that no record knows, such as another machine's.
  const { stdout: found } = await execa('find', [web.stateDir, '-name', `${id}.json`])
  await rm(found)
  await copy()
  await chains.delete(id, web.run)
  expect(web.warnings().at(-1)).toContain(`rbd snap rm ${image}@varve-${id}`)
  expect(await snapshots(image)).toContain(`varve-${id}`)
})

test('snapshots and images that no run and no backup knows are found, and left alone', async () => {
  const image = await site.create(MIB)
  const web = await RbdInstance.of(site, `rbd:${image}`)
  const { host, storage, stateDir } = web.parts()
  vi.useFakeTimers({ toFake: ['Date'], now: new Date('2025-01-01') })
  const stored = await web.backup().finally(() => vi.useRealTimers())
  const [old, cut, now] = ['20250102-030405-006-abcdef', '20250102-030405-007-abcdef', newBackupId()]
  await RunJournal.begin(stateDir, {
    version: 1,
    id: cut, // was cut short, and is left to recover()
    kind: 'backup',
    instance: 'web-1',
    host: host.reference,
    storage,
    disks: [],
    startedAt: '2025-01-02T03:04:05Z',
  })
  const { client } = site.ceph
  const others = [old, cut, now, 'mine'] // of `now` another machine may be at it
  for (const id of others) await client.createSnapshot(image, `varve-${id}`)
  await client.create(`${image}.varve-restore-${old}`, MIB)
  await client.create(`${image}.varve-replaced-${now}`, MIB)
  await client.create(`${image}0.varve-restore-${old}`, MIB) // for an image that was still to be
  const options = { host, storages: [storage], stateDir }
  expect(await findOrphans(options)).toEqual([
    { image, snapshot: `varve-${old}`, run: old },
    { image: `${image}.varve-restore-${old}`, run: old },
    { image: `${image}0.varve-restore-${old}`, run: old },
  ])
  expect(await snapshots(image)).toHaveLength(5)
  expect(await snapshots(image)).toContain(`varve-${stored.id}`)

  // No backup names the image any more, but it is a disk of an instance that backups were taken of here.
  await new ChainManager({ storage }).delete(stored.id)
  expect(await findOrphans(options)).toContainEqual({
    image,
    snapshot: `varve-${stored.id}`,
    run: stored.id,
  })
})
