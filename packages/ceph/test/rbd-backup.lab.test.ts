import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { Readable } from 'node:stream'
import { type BackupManifest, BackupPipeline, type RbdConnector, recover } from '@varve/core'
import { LocalDriver } from '@varve/driver-local'
import { createQcow2, qemuIo } from '@varve/testkit/lab'
import { thoroughTest } from '@varve/testkit/thorough'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { clusterWith, expectSame, RbdInstance } from './rbd-instance.ts'
import { RbdSite } from './rbd-site.ts'

const MIB = 1024 ** 2

let site: RbdSite
/** An image, and an instance of it with a full backup, whose chain each test goes on with. */
let image: string
let web: RbdInstance

beforeAll(async () => {
  site = await RbdSite.start()
  // Small objects: rbd reads ten of them ahead.
  image = await site.create(16 * MIB, '--object-size', '256K')
  web = await RbdInstance.of(site, `rbd:${image}`)
  await site.write(image, 'write -P 1 0 9M')
  await web.backup()
})
afterAll(() => site[Symbol.asyncDispose]())

const snapshots = (of: string) => site.snapshots(of)

async function newest(): Promise<BackupManifest> {
  const found = (await web.chains.list()).backups.at(-1)
  if (!found) throw new Error('there is no backup')
  return found.manifest
}

test('an increment has what was written, zeroed and trimmed, and costs no more than that', async () => {
  const before = await newest()
  await site.write(image, 'write -P 4 1M 300k', 'write -z 4M 2M', 'discard 7M 1M', 'write -P 5 14M 1M')
  const next = await web.backup()
  expect(next).toMatchObject({ kind: 'incremental', parent: before.id, consistency: 'offline' })
  expectSame(await web.restoredToQcow2(next), await site.bytes(image))
  expect(before.disks[0]?.storedSize).toBeLessThan(10 * MIB)
  expect(next.disks[0]?.storedSize).toBeLessThan(2 * MIB)
  expect(await snapshots(image)).toEqual([before, next].map(({ id }) => `varve-${id}`))
})

thoroughTest(
  'an instance may have images and files at once, of which one begins anew in the middle of a chain',
  async () => {
    const vda = await site.create(8 * MIB)
    const file = join(site.ceph.folder, 'vdb.qcow2')
    await createQcow2(file, 8 * MIB)
    const both = await RbdInstance.of(site, { vda: `rbd:${vda}`, vdb: file })
    await site.write(vda, 'write -P 1 0 5M')
    await qemuIo(file, 'qcow2', ['write -P 2 3M 2M'])
    const first = await both.backup()

    // The image is stored in full again, and has less than it had.
    await site.ceph.client.removeSnapshots(vda, `varve-${first.id}`)
    await site.write(vda, 'discard 0 4M')
    await qemuIo(file, 'qcow2', ['write -P 4 4M 1M'])
    const second = await both.backup()
    await site.write(vda, 'write -P 5 6M 1M')
    const third = await both.backup()
    const described = [first, second, third].map(({ chain, disks }) => [
      chain,
      ...disks.flatMap(({ kind, format }) => [kind, format]),
    ])
    expect(described).toEqual([
      [first.id, 'full', 'rbd-diff', 'full', 'qcow2'],
      [first.id, 'full', 'rbd-diff', 'incremental', 'qcow2'],
      [first.id, 'incremental', 'rbd-diff', 'incremental', 'qcow2'],
    ])
    const wanted = await site.bytes(vda)
    expectSame(await both.restored(third), wanted)
    expectSame(await both.restored(third, 'vdb'), await both.rawOf(file))
    // Without Varve, as docs/ceph.md has it: from the newest stream that is a full one.
    const streams = [first, second, third].map(({ id }) =>
      join(both.folder, 'storage', 'web-1', first.id, id, 'vda.rbd-diff'),
    )
    const starts = await Promise.all(
      streams.map(async path => (await readFile(path)).toString('latin1', 12, 13)),
    )
    expect(starts).toEqual(['t', 't', 'f'])
    const plain = await site.create(8 * MIB)
    for (const stream of streams.slice(starts.lastIndexOf('t')))
      await site.ceph.run('rbd', 'import-diff', '--no-progress', stream, plain)
    expectSame(await site.bytes(plain), wanted)
  },
)

test('a backup that fails leaves no snapshot, and the next increment rests on the one before', async () => {
  class Failing extends LocalDriver {
    override async put(...args: Parameters<LocalDriver['put']>) {
      if (args[0].endsWith('.rbd-diff')) throw new Error('is full') // before it reads
      return super.put(...args)
    }
  }
  const { id } = await newest()
  const before = await snapshots(image)
  await site.write(image, 'write -P 2 8M 4M')
  const { location } = web.storage
  const full = { ...web.parts(), storage: new Failing({ path: location }) }
  await expect(new BackupPipeline(full).run({ instance: 'web-1' })).rejects.toThrow('is full')
  expect(await snapshots(image)).toEqual(before)

  const controller = new AbortController()
  const aborted = new BackupPipeline(web.parts()).run(
    { instance: 'web-1', rbdSnapshots: 1 },
    {
      signal: controller.signal,
      onEvent: event => event.type === 'stage' && event.stage === 'publish' && controller.abort(),
    },
  )
  await expect(aborted).rejects.toMatchObject({ code: 'ABORTED' })
  expect(await snapshots(image)).toEqual(before)
  const { stateDir, storage } = web
  expect(await recover({ stateDir, storages: [storage], rbd: site.rbd })).toEqual({ runs: [], ok: true })
  const next = await web.backup({ rbdSnapshots: 1 })
  expect([next.kind, next.parent]).toEqual(['incremental', id])
  expectSame(await web.restored(next), await site.bytes(image))
  expect(await snapshots(image)).toEqual([`varve-${next.id}`])
})

test('an image whose object map Ceph has found to be wrong is backed up right, and told of', async () => {
  await site.write(image, 'write -P 2 8M 4M', 'discard 0 1M')
  const { id } = await site.cluster.image(image)
  await site.ceph.run('rados', '-p', 'vms', 'rm', `rbd_object_map.${id}`)
  await site.write(image, 'write -P 3 5M 64k') // whoever takes the lock looks for the map
  expect(await site.ceph.run('rbd', 'info', image)).toContain('object map invalid')
  const next = await web.backup()
  expect(next.kind).toBe('incremental')
  expectSame(await web.restored(next), await site.bytes(image))
  expect(web.warnings()).toContainEqual(expect.stringContaining('rbd object-map rebuild'))
})

test('a snapshot that somebody removes while it is read fails the backup, and nothing is published', async () => {
  await site.write(image, 'write -P 6 0 16M')
  const parent = await web.backup()
  await site.write(image, 'write -P 2 0 12M', 'discard 13M 1M', 'discard 14M 128k', 'discard 15M 640k')
  for (const whose of ['its own', 'the parent'] as const) {
    /** Has the snapshot removed once the first bytes have come. */
    class Meddled extends LocalDriver {
      override put(...[key, body, options]: Parameters<LocalDriver['put']>) {
        if (!key.endsWith('.rbd-diff') || !('read' in body)) return super.put(key, body, options)
        return super.put(key, Readable.from(meddledWith(body), { objectMode: false }), options)
      }
    }
    const removed = async () => {
      const own = (await snapshots(image)).find(name => name > `varve-${parent.id}`)
      await site.cluster.removeSnapshots(image, [whose === 'its own' ? `${own}` : `varve-${parent.id}`])
    }
    async function* meddledWith(stream: AsyncIterable<Buffer>) {
      let isRemoved = false
      for await (const chunk of stream) {
        if (!isRemoved) await removed()
        isRemoved = true
        yield chunk
      }
    }
    const storage = new Meddled({ path: web.storage.location })
    const running = new BackupPipeline({ ...web.parts(), storage }).run({ instance: 'web-1' })
    await expect(running, whose).rejects.toMatchObject({ code: 'RBD_SNAPSHOT_NOT_FOUND', retryable: true })
    expect((await newest()).id).toBe(parent.id)
  }
  expectSame(await web.restored(await web.backup()), await site.bytes(image))
})

test('an image that was made again under its name, or whose snapshot was, is stored in full and told of', async () => {
  const again = `varve-${(await newest()).id}`
  await site.ceph.client.removeSnapshots(image, ...(await snapshots(image)))
  await site.write(image, 'write -P 2 0 1M')
  await site.ceph.client.createSnapshot(image, again)
  const second = await web.backup()
  expect(second.disks[0]).toMatchObject({ kind: 'full', fallback: 'snapshot-replaced' })
  expectSame(await web.restored(second), await site.bytes(image))

  await site.ceph.client.removeSnapshots(image, ...(await snapshots(image)))
  await site.ceph.run('rbd', 'rm', '--no-progress', image)
  await site.ceph.client.create(image, 16 * MIB)
  await site.ceph.client.createSnapshot(image, `varve-${second.id}`)
  await site.write(image, 'write -P 3 0 1M')
  const third = await web.backup()
  expect(third.disks[0]).toMatchObject({ kind: 'full', fallback: 'disk-replaced' })
  expectSame(await web.restored(third), await site.bytes(image))
})

test('an image that a virtual machine elsewhere has open is backed up as after a power cut, and several are not', async () => {
  const [one, other] = [await site.create(MIB), await site.create(MIB)]
  const alone = await RbdInstance.of(site, `rbd:${one}`)
  const both = await RbdInstance.of(site, { vda: `rbd:${one}`, vdb: `rbd:${other}` })
  await using _elsewhere = await site.opened(one)
  expect(await alone.backup()).toMatchObject({ running: false, consistency: 'crash' })
  expect(alone.warnings()).toContainEqual(expect.stringContaining('crash-consistent'))
  await expect(both.backup()).rejects.toMatchObject({
    code: 'DISK_BUSY',
    context: { images: [one] },
    retryable: true,
  })
  expect(await snapshots(other)).toEqual([])
})

test('disks of an instance that was started while they were frozen are not backed up as those of one that is off', async () => {
  const [one, other] = [await site.create(MIB), await site.create(MIB)]
  const file = join(site.ceph.folder, 'started.qcow2')
  await createQcow2(file, MIB)
  const machine: AsyncDisposable[] = []
  const started = clusterWith(site.rbd, cluster => ({
    async createSnapshot(name, ...args) {
      if (name === one) machine.push(await site.opened(one))
      return cluster.createSnapshot(name, ...args)
    },
  }))
  const stopped = clusterWith(site.rbd, cluster => ({
    async createSnapshot(...args) {
      await cluster.createSnapshot(...args)
      await qemuIo(file, 'qcow2', ['write -P 2 0 64k'])
    },
  }))
  const images = await RbdInstance.of(site, { vda: `rbd:${one}`, vdb: `rbd:${other}` })
  const mixed = images.with({ vda: `rbd:${one}`, vdb: file })
  const backup = (instance: RbdInstance, connector: RbdConnector) => instance.backup({}, connector)
  // It runs still, or has stopped again.
  await expect(backup(images, started)).rejects.toMatchObject({
    code: 'DISK_BUSY',
    context: { images: [one] },
  })
  for (const client of machine) await client[Symbol.asyncDispose]()
  await expect(backup(mixed, stopped)).rejects.toMatchObject({
    code: 'DISK_BUSY',
    context: { disk: 'vdb' },
    retryable: true,
  })
  expect(await snapshots(one)).toEqual([])
  expect((await images.chains.list()).backups).toEqual([])
})
