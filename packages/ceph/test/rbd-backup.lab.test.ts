import { once } from 'node:events'
import { cp, mkdir, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import {
  type BackupManifest,
  BackupPipeline,
  type BackupRequest,
  ChainManager,
  findOrphans,
  type Host,
  ImageHost,
  type RbdCluster,
  type RbdConnector,
  RestorePipeline,
  type RestoreRequest,
  recover,
  type VarveEvent,
} from '@varve/core'
import { LocalDriver } from '@varve/driver-local'
import { SftpDriver } from '@varve/driver-sftp'
import { checkQcow2, createQcow2, qemuIo, startSshd } from '@varve/testkit/lab'
import { execa } from 'execa'
import { afterAll, afterEach, beforeAll, beforeEach, expect, test, vi } from 'vitest'
import { newBackupId } from '../../core/src/backup-id.ts'
import { DiskLock } from '../../core/src/disk-lock.ts'
import { RunJournal } from '../../core/src/journal.ts'
import { login } from '../../driver-sftp/test/sftp-target.ts'
import { CephConnector } from '../src/index.ts'
import { RbdSite } from './rbd-site.ts'

const MIB = 1024 ** 2

let site: RbdSite
let folder: string
let storage: LocalDriver
let events: VarveEvent[]
let rbd: CephConnector

beforeAll(async () => {
  site = await RbdSite.start()
  const { ceph, user } = site
  rbd = new CephConnector({ conf: ceph.conf, user: user.user, keyring: user.keyring })
})
afterAll(() => site[Symbol.asyncDispose]())
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'varve-rbd-backup-'))
  storage = new LocalDriver({ path: join(folder, 'storage'), create: true })
  events = []
})
afterEach(() => rm(folder, { recursive: true }))

const run = { onEvent: (event: VarveEvent) => void events.push(event) }
const stateDir = () => join(folder, 'state')

function hostOf(disks: Record<string, string>, connector: RbdConnector = rbd): Host {
  return new ImageHost({ instance: 'web-1', disks, rbd: connector })
}

/** The cluster, with something that happens around its calls. */
function clusterWith(change: (cluster: RbdCluster) => Partial<RbdCluster>): RbdConnector {
  return {
    cluster(connection) {
      const cluster = rbd.cluster(connection)
      return Object.assign(cluster, change(rbd.cluster(connection)))
    },
  }
}

/** A client that has an image open for writing until the end, as a virtual machine has. */
async function opened(image: string): Promise<AsyncDisposable> {
  const client = execa('qemu-io', ['-f', 'raw', `rbd:${image}:conf=${site.ceph.conf}`], {
    stdin: 'pipe',
    buffer: false,
  })
  await once(client.stdout, 'data') // its prompt
  return {
    async [Symbol.asyncDispose]() {
      client.stdin.end()
      await client
    },
  }
}

function backup(
  disks: Record<string, string>,
  request: Partial<BackupRequest> = {},
): Promise<BackupManifest> {
  const pipeline = new BackupPipeline({ host: hostOf(disks), storage, stateDir: stateDir() })
  return pipeline.run({ instance: 'web-1', ...request }, run)
}

function restore(request: RestoreRequest, disks: Record<string, string> = {}) {
  return new RestorePipeline({ host: hostOf(disks), storage, stateDir: stateDir() }).run(request, run)
}

async function rawOf(path: string): Promise<Buffer> {
  const raw = join(folder, 'converted.raw')
  await execa('qemu-img', ['convert', '-f', 'qcow2', '-O', 'raw', path, raw])
  return readFile(raw)
}

/** The bytes of a backup, restored to a new raw file. */
async function restoredBytes({ id }: BackupManifest, disk = 'vda'): Promise<Buffer> {
  const path = join(folder, `restored-${id}-${disk}`)
  await restore({ backup: id, to: { disks: { [disk]: path }, format: 'raw' } })
  return readFile(path)
}

/** The bytes of a backup, restored to a new qcow2 file. */
async function restoredToQcow2({ id }: BackupManifest): Promise<Buffer> {
  const path = join(folder, `restored-${id}.qcow2`)
  await restore({ backup: id, to: { disks: { vda: path } } })
  await checkQcow2(path)
  return rawOf(path)
}

const snapshots = (image: string) => site.snapshots(image)

function expectSame(found: Buffer, expected: Buffer): void {
  expect(found.length).toBe(expected.length)
  expect(Buffer.compare(found, expected)).toBe(0)
}

test('a full backup and increments of an image that is written, zeroed and trimmed restore what it held at each', async () => {
  const image = await site.create(64 * MIB)
  const disks = { vda: `rbd:${image}` }
  await site.write(image, 'write -P 1 0 9M', 'write -P 2 20M 3M', 'write -P 3 40M 100k')
  const full = await backup(disks)
  const first = await site.bytes(image)
  await site.write(image, 'write -P 4 1M 300k', 'write -z 4M 2M', 'discard 20M 1M', 'write -P 5 60M 4M')
  const second = await backup(disks)
  const secondBytes = await site.bytes(image)
  await site.write(image, 'discard 0 64M', 'write -P 6 63M 1M')
  const third = await backup(disks)

  expect([full, second, third].map(({ kind }) => kind)).toEqual(['full', 'incremental', 'incremental'])
  expectSame(await restoredBytes(full), first)
  expectSame(await restoredBytes(second), secondBytes)
  expectSame(await restoredToQcow2(third), await site.bytes(image))
  // What was never written costs nothing.
  expect(full.disks[0]?.storedSize).toBeLessThan(13 * MIB)
  expect(second.disks[0]?.storedSize).toBeLessThan(6 * MIB)
  expect(await new ChainManager({ storage }).verify(third.id, { deep: true })).toMatchObject({ ok: true })
  expect(await snapshots(image)).toEqual([`varve-${second.id}`, `varve-${third.id}`])
})

test('an image may shrink, grow, and shrink and grow again between backups', async () => {
  const image = await site.create(32 * MIB)
  const disks = { vda: `rbd:${image}` }
  await site.write(image, 'write -P 1 0 32M')
  await backup(disks)
  let last: BackupManifest | undefined
  for (const sizes of [[12], [40], [8, 24]]) {
    for (const size of sizes) await site.ceph.client.resize(image, size * MIB)
    await site.write(image, 'write -P 7 2M 64k')
    const manifest = await backup(disks)
    expect(manifest.kind).toBe('incremental')
    expectSame(await restoredBytes(manifest), await site.bytes(image))
    last = manifest
  }

  // In place over an image that has grown since: what is behind the disk's end reads as zeros.
  const wanted = Buffer.alloc(40 * MIB)
  wanted.set(await site.bytes(image))
  await site.ceph.client.resize(image, 40 * MIB)
  await site.write(image, 'write -P 9 0 40M')
  await restore({ backup: last?.id ?? '', to: { disks }, inPlace: true })
  expectSame(await site.bytes(image), wanted)
  await site.write(image, 'write -P 3 39M 64k')
  const next = await backup(disks)
  expect([next.kind, next.parent]).toEqual(['incremental', last?.id])
  expectSame(await restoredBytes(next), await site.bytes(image))
})

test('an instance may have images and files at once, of which one begins anew in the middle of a chain', async () => {
  const image = await site.create(16 * MIB)
  const file = join(folder, 'vdb.qcow2')
  await createQcow2(file, 16 * MIB)
  const disks = { vda: `rbd:${image}`, vdb: file }
  await site.write(image, 'write -P 1 0 5M')
  await qemuIo(file, 'qcow2', ['write -P 2 3M 5M'])
  const first = await backup(disks)
  await site.write(image, 'write -P 3 1M 1M')
  await qemuIo(file, 'qcow2', ['write -P 4 4M 1M'])
  const second = await backup(disks)
  expect(second.disks.map(({ kind, format }) => [kind, format])).toEqual([
    ['incremental', 'rbd-diff'],
    ['incremental', 'qcow2'],
  ])
  expectSame(await restoredBytes(second), await site.bytes(image))
  expectSame(await restoredBytes(second, 'vdb'), await rawOf(file))

  // The image is stored in full again in the middle of the chain, and has less than it had.
  await site.ceph.client.removeSnapshots(image, `varve-${second.id}`)
  await site.ceph.client.removeSnapshots(image, `varve-${first.id}`)
  await site.write(image, 'discard 0 4M')
  const third = await backup(disks)
  await site.write(image, 'write -P 5 9M 1M')
  const fourth = await backup(disks)
  expect([third, fourth].map(({ chain, disks }) => [chain, ...disks.map(({ kind }) => kind)])).toEqual([
    [first.id, 'full', 'incremental'],
    [first.id, 'incremental', 'incremental'],
  ])
  const wanted = await site.bytes(image)
  expectSame(await restoredBytes(fourth), wanted)
  // Without Varve, as docs/ceph.md has it: from the newest stream that is a full one.
  const streams = [first, second, third, fourth].map(({ id }) =>
    join(folder, 'storage', 'web-1', first.id, id, 'vda.rbd-diff'),
  )
  const starts = await Promise.all(
    streams.map(async path => (await readFile(path)).toString('latin1', 12, 13)),
  )
  expect(starts).toEqual(['t', 'f', 't', 'f'])
  const plain = await site.create(16 * MIB)
  for (const stream of streams.slice(starts.lastIndexOf('t')))
    await site.ceph.run('rbd', 'import-diff', '--no-progress', stream, plain)
  expectSame(await site.bytes(plain), wanted)
})

test('a restore makes a new image, or replaces one by a new one, and the chain goes on from it', async () => {
  const image = await site.create(16 * MIB, '--object-size', '1M')
  const disks = { vda: `rbd:${image}` }
  await site.write(image, 'write -P 1 0 9M')
  await backup(disks)
  await site.write(image, 'write -P 2 8M 4M', 'discard 0 1M')
  const second = await backup(disks)
  const wanted = await site.bytes(image)
  const copy = site.newImage()
  await restore({ backup: second.id, to: { disks: { vda: `rbd:${copy}` } } })
  expectSame(await site.bytes(copy), wanted)
  expect(await snapshots(copy)).toEqual([]) // no backup of it would ever remove one

  await site.write(image, 'write -P 9 0 16M')
  await expect(restore({ backup: second.id, to: { disks } })).rejects.toMatchObject({ code: 'TARGET_EXISTS' })
  const before = await site.cluster.image(image)
  await restore({ backup: second.id, to: { disks, overwrite: true } })
  expectSame(await site.bytes(image), wanted)
  const after = await site.cluster.image(image)
  expect(after.id).not.toBe(before.id)
  expect(await site.ceph.run('rbd', 'info', image)).toContain('order 20') // objects of 1 MiB, as before
  expect((await site.ceph.client.list('vms')).filter(name => name.includes('varve'))).toEqual([])

  await site.write(image, 'write -P 3 15M 64k')
  const next = await backup(disks)
  expect([next.kind, next.parent]).toEqual(['incremental', second.id])
  expectSame(await restoredBytes(next), await site.bytes(image))
})

test('a restore in place rolls the image back and fetches only what is newer', async () => {
  const image = await site.create(16 * MIB)
  const disks = { vda: `rbd:${image}` }
  const inPlace = (manifest: BackupManifest) => restore({ backup: manifest.id, to: { disks }, inPlace: true })
  await site.write(image, 'write -P 1 0 9M')
  const full = await backup(disks)
  const first = await site.bytes(image)
  await site.write(image, 'write -P 2 8M 4M', 'discard 0 1M')
  const second = await backup(disks)
  const wanted = await site.bytes(image)
  await site.write(image, 'write -P 9 0 16M')
  expect((await inPlace(second)).disks[0]?.bytesWritten).toBe(0)
  expectSame(await site.bytes(image), wanted)

  // Its newest snapshot is gone: from the older one on.
  await site.write(image, 'write -P 9 0 16M')
  await site.ceph.client.removeSnapshots(image, `varve-${second.id}`)
  expect((await inPlace(second)).disks[0]?.bytesWritten).toBe(4 * MIB)
  expectSame(await site.bytes(image), wanted)

  // All are gone: everything.
  await site.write(image, 'write -P 9 0 16M')
  await site.ceph.client.removeSnapshots(image, ...(await snapshots(image)))
  expect((await inPlace(full)).disks[0]?.bytesWritten).toBe(9 * MIB)
  expectSame(await site.bytes(image), first)
  await site.write(image, 'write -P 3 15M 64k')
  const next = await backup(disks)
  expect([next.kind, next.parent]).toEqual(['incremental', full.id])
  expectSame(await restoredBytes(next), await site.bytes(image))
})

test('an image that another client has open is not restored in place under it', async () => {
  const image = await site.create(8 * MIB)
  const disks = { vda: `rbd:${image}` }
  await site.write(image, 'write -P 1 0 4M')
  const { id } = await backup(disks)
  await site.write(image, 'write -P 2 0 4M')
  const now = await site.bytes(image)

  /** Restores in place, and gives up once the image is seen open for the second time. */
  const givenUp = async (connector: RbdConnector, isOpen: () => boolean) => {
    const controller = new AbortController()
    let looks = 0
    const onEvent = (event: VarveEvent) => {
      if (event.type === 'command' && event.args[0] === 'status' && isOpen() && ++looks > 1)
        controller.abort()
    }
    const pipeline = new RestorePipeline({ host: hostOf(disks, connector), storage, stateDir: stateDir() })
    const request = { backup: id, to: { instance: 'web-1' }, inPlace: true }
    return pipeline.run(request, { signal: controller.signal, onEvent })
  }
  {
    await using _machine = await opened(image)
    await expect(givenUp(rbd, () => true)).rejects.toMatchObject({ code: 'ABORTED', context: {} })
  }
  expectSame(await site.bytes(image), now)

  // One that opens it while it is written over.
  let machine: AsyncDisposable | undefined
  const late = clusterWith(cluster => ({
    async rollback(...args) {
      await cluster.rollback(...args)
      machine = await opened(image)
    },
  }))
  const incomplete = { code: 'ABORTED', context: { incomplete: ['vda'] } }
  await expect(givenUp(late, () => machine !== undefined)).rejects.toMatchObject(incomplete)
  await machine?.[Symbol.asyncDispose]()
  await restore({ backup: id, to: { instance: 'web-1' }, inPlace: true }, disks)
  expect((await site.bytes(image)).subarray(0, 4 * MIB).every(byte => byte === 1)).toBe(true)
})

test('images and files restore to each other', async () => {
  const file = join(folder, 'vda.qcow2')
  await createQcow2(file, 16 * MIB)
  await qemuIo(file, 'qcow2', ['write -P 2 3M 5M', 'write -P 4 15M 100k'])
  const manifest = await backup({ vda: file })
  const copy = site.newImage()
  await restore({ backup: manifest.id, to: { disks: { vda: `rbd:${copy}` } } })
  expectSame(await site.bytes(copy), await rawOf(file))
  // A chain, over an image that has other data.
  await qemuIo(file, 'qcow2', ['write -P 5 4M 1M', 'write -z 3M 64k', 'discard 15M 1M'])
  const second = await backup({ vda: file })
  expect(second.kind).toBe('incremental')
  await site.write(copy, 'write -P 9 0 16M')
  await restore({ backup: second.id, to: { disks: { vda: `rbd:${copy}` } }, inPlace: true })
  expectSame(await site.bytes(copy), await rawOf(file))
  // The disk is an image from here on: a full one, and told why.
  const moved = await backup({ vda: `rbd:${copy}` })
  expect(moved.disks[0]).toMatchObject({ kind: 'full', fallback: 'disk-replaced' })
})

test('an image that was made again under its name, or whose snapshot was, is stored in full and told of', async () => {
  const image = await site.create(8 * MIB)
  const disks = { vda: `rbd:${image}` }
  await site.write(image, 'write -P 1 0 4M')
  const full = await backup(disks)
  const again = `varve-${full.id}`
  await site.ceph.client.removeSnapshots(image, again)
  await site.write(image, 'write -P 2 0 1M')
  await site.ceph.client.createSnapshot(image, again)
  const second = await backup(disks)
  expect(second.disks[0]).toMatchObject({ kind: 'full', fallback: 'snapshot-replaced' })
  expectSame(await restoredBytes(second), await site.bytes(image))

  await site.ceph.client.removeSnapshots(image, ...(await snapshots(image)))
  await site.ceph.run('rbd', 'rm', '--no-progress', image)
  await site.ceph.client.create(image, 8 * MIB)
  await site.ceph.client.createSnapshot(image, `varve-${second.id}`)
  await site.write(image, 'write -P 3 0 1M')
  const third = await backup(disks)
  expect(third.disks[0]).toMatchObject({ kind: 'full', fallback: 'disk-replaced' })
  expectSame(await restoredBytes(third), await site.bytes(image))
})

test('a backup that fails leaves no snapshot, and the next increment rests on the one before', async () => {
  const image = await site.create(16 * MIB)
  const disks = { vda: `rbd:${image}` }
  await site.write(image, 'write -P 1 0 9M')
  const full = await backup(disks)
  await site.write(image, 'write -P 2 8M 4M')
  for (const stage of ['upload', 'publish']) {
    const controller = new AbortController()
    const pipeline = new BackupPipeline({ host: hostOf(disks), storage, stateDir: stateDir() })
    const aborted = pipeline.run(
      { instance: 'web-1', rbdSnapshots: 1 },
      {
        signal: controller.signal,
        onEvent: event => event.type === 'stage' && event.stage === stage && controller.abort(),
      },
    )
    await expect(aborted).rejects.toMatchObject({ code: 'ABORTED' })
    expect(await snapshots(image)).toEqual([`varve-${full.id}`])
  }
  expect(await recover({ stateDir: stateDir(), storages: [storage], rbd })).toEqual({ runs: [], ok: true })
  const next = await backup(disks, { rbdSnapshots: 1 })
  expect([next.kind, next.parent]).toEqual(['incremental', full.id])
  expectSame(await restoredBytes(next), await site.bytes(image))
  expect(await snapshots(image)).toEqual([`varve-${next.id}`])
})

test('the snapshot of a backup that is deleted or pruned goes with it, where the host is known', async () => {
  const image = await site.create(8 * MIB)
  const disks = { vda: `rbd:${image}` }
  const chains = new ChainManager({ storage, host: hostOf(disks), stateDir: stateDir() })
  const full = await backup(disks)
  const second = await backup(disks)
  await chains.delete(second.id, run)
  expect(await snapshots(image)).toEqual([`varve-${full.id}`])
  await site.write(image, 'write -P 1 0 1M')
  const third = await backup(disks)
  expect([third.kind, third.parent]).toEqual(['incremental', full.id])
  expectSame(await restoredBytes(third), await site.bytes(image))

  const other = await backup(disks, { type: 'full', rbdSnapshots: 9 })
  expect(await snapshots(image)).toEqual([full, third, other].map(({ id }) => `varve-${id}`))
  await chains.prune({ keepLast: 1 }, { dryRun: true })
  expect(await snapshots(image)).toHaveLength(3)
  const { removed } = await chains.prune({ keepLast: 1 }, run)
  expect(removed).toHaveLength(2)
  expect(await snapshots(image)).toEqual([`varve-${other.id}`])
  expect(events.filter(({ type }) => type === 'warning')).toEqual([])
})

test('a backup is deleted also where its snapshot has to stay, which is told of; it goes with the next backup', async () => {
  const image = await site.create(8 * MIB)
  const disks = { vda: `rbd:${image}` }
  const full = await backup(disks)
  const second = await backup(disks)
  const warnings = () => events.flatMap(event => (event.type === 'warning' ? [event.message] : []))
  const unreachable = new CephConnector({ conf: '/dev/null', monitors: ['127.0.0.1:1'], timeoutMs: 1000 })
  const away = new ImageHost({ instance: 'web-1', disks, rbd: unreachable })
  await new ChainManager({ storage, host: away, stateDir: stateDir() }).delete(second.id, run)
  expect(warnings()).toEqual([expect.stringContaining(`varve-${second.id} of the RBD image ${image} stays`)])
  expect(await snapshots(image)).toEqual([`varve-${full.id}`, `varve-${second.id}`])
  const third = await backup(disks)
  expect(third.parent).toBe(full.id)
  expect(await snapshots(image)).toEqual([`varve-${full.id}`, `varve-${third.id}`])

  // A run holds the disk.
  events.length = 0
  await using _lock = await DiskLock.acquire([disks.vda])
  await new ChainManager({ storage, host: hostOf(disks), stateDir: stateDir() }).delete(third.id, run)
  expect(warnings()).toHaveLength(1)
  expect(await snapshots(image)).toContain(`varve-${third.id}`)
})

test('a backup that is copied, or forged, to another storage does not take the snapshot of its original along', async () => {
  const image = await site.create(8 * MIB)
  const disks = { vda: `rbd:${image}` }
  const { id, chain } = await backup(disks)
  const other = new LocalDriver({ path: join(folder, 'other'), create: true })
  const options = { host: hostOf(disks), storage: other, stateDir: stateDir() }
  await new BackupPipeline(options).run({ instance: 'web-1' })
  const place = join('web-1', chain, id)
  await cp(join(folder, 'storage', place), join(folder, 'other', place), { recursive: true })
  const chains = new ChainManager(options)
  await chains.delete(id, run)
  expect(events.at(-1)).toEqual({
    type: 'warning',
    message: expect.stringContaining(`that backup went to ${storage.location}`),
  })
  expect(await snapshots(image)).toContain(`varve-${id}`)
  expect((await backup(disks)).parent).toBe(id)

  // Nor one that no record knows, such as another machine's.
  const { stdout: found } = await execa('find', [stateDir(), '-name', `${id}.json`])
  await rm(found)
  await cp(join(folder, 'storage', place), join(folder, 'other', place), { recursive: true })
  await chains.delete(id, run)
  expect(events.at(-1)).toEqual({
    type: 'warning',
    message: expect.stringContaining(`rbd snap rm ${image}@varve-${id}`),
  })
  expect(await snapshots(image)).toContain(`varve-${id}`)
})

test('snapshots and images that no run and no backup knows are found, and left alone', async () => {
  const image = await site.create(8 * MIB)
  const disks = { vda: `rbd:${image}` }
  vi.useFakeTimers({ toFake: ['Date'], now: new Date('2025-01-01') })
  const stored = await backup(disks).finally(() => vi.useRealTimers())
  const [old, cut, now] = ['20250102-030405-006-abcdef', '20250102-030405-007-abcdef', newBackupId()]
  await RunJournal.begin(stateDir(), {
    version: 1,
    id: cut, // was cut short, and is left to recover()
    kind: 'backup',
    instance: 'web-1',
    host: hostOf(disks).reference,
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
  const options = { host: hostOf(disks), storages: [storage], stateDir: stateDir() }
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

test('a snapshot that somebody removes while it is read fails the backup, and nothing is published', async () => {
  const image = await site.create(32 * MIB)
  const disks = { vda: `rbd:${image}` }
  for (const whose of ['the parent', 'its own']) {
    await site.write(image, 'write -P 1 0 32M')
    const full = await backup(disks, { type: 'full' })
    await site.write(image, 'write -P 2 0 16M', 'discard 17M 3M', 'discard 21M 3M', 'discard 25M 3M')
    const reading = Promise.withResolvers<void>()
    const onEvent = (event: VarveEvent) =>
      event.type === 'progress' && event.bytesDone > 0 && reading.resolve()
    const pipeline = new BackupPipeline({ host: hostOf(disks), storage, stateDir: stateDir() })
    const running = pipeline.run({ instance: 'web-1', bandwidth: 6 * MIB }, { onEvent })
    const failed = expect(running, whose).rejects.toMatchObject({
      code: 'RBD_SNAPSHOT_NOT_FOUND',
      retryable: true,
    })
    await reading.promise
    const own = (await snapshots(image)).find(name => name > `varve-${full.id}`)
    await site.cluster.removeSnapshots(image, [whose === 'the parent' ? `varve-${full.id}` : `${own}`])
    await failed
    const { backups } = await new ChainManager({ storage }).list()
    expect(backups.at(-1)?.manifest.id).toBe(full.id)
  }
  expectSame(await restoredBytes(await backup(disks)), await site.bytes(image))
})

test('an image that a virtual machine elsewhere has open is backed up as after a power cut, and several are not', async () => {
  const [image, other] = [await site.create(8 * MIB), await site.create(8 * MIB)]
  await site.write(image, 'write -P 1 0 1M')
  {
    await using _elsewhere = await opened(image)
    expect(await backup({ vda: `rbd:${image}` })).toMatchObject({ running: false, consistency: 'crash' })
    expect(events).toContainEqual({ type: 'warning', message: expect.stringContaining('crash-consistent') })
    await expect(backup({ vda: `rbd:${image}`, vdb: `rbd:${other}` })).rejects.toMatchObject({
      code: 'DISK_BUSY',
      context: { images: [image] },
      retryable: true,
    })
    expect(await snapshots(other)).toEqual([])
  }
  expect(await backup({ vda: `rbd:${image}`, vdb: `rbd:${other}` })).toMatchObject({ consistency: 'offline' })
})

test('disks of an instance that was started while they were frozen are not backed up as those of one that is off', async () => {
  const [image, other] = [await site.create(8 * MIB), await site.create(8 * MIB)]
  const file = join(folder, 'vdb.qcow2')
  await createQcow2(file, MIB)
  const machine: AsyncDisposable[] = []
  const started = clusterWith(cluster => ({
    async createSnapshot(name, ...args) {
      if (name === image) machine.push(await opened(image))
      return cluster.createSnapshot(name, ...args)
    },
  }))
  const stopped = clusterWith(cluster => ({
    async createSnapshot(...args) {
      const snapshot = await cluster.createSnapshot(...args)
      await qemuIo(file, 'qcow2', ['write -P 2 0 64k'])
      return snapshot
    },
  }))
  const run = (disks: Record<string, string>, connector: RbdConnector) =>
    new BackupPipeline({ host: hostOf(disks, connector), storage, stateDir: stateDir() }).run({
      instance: 'web-1',
    })
  // It runs still, or has stopped again.
  await expect(run({ vda: `rbd:${image}`, vdb: `rbd:${other}` }, started)).rejects.toMatchObject({
    code: 'DISK_BUSY',
    context: { images: [image] },
  })
  for (const client of machine) await client[Symbol.asyncDispose]()
  await expect(run({ vda: `rbd:${image}`, vdb: file }, stopped)).rejects.toMatchObject({
    code: 'DISK_BUSY',
    context: { disk: 'vdb' },
    retryable: true,
  })
  expect(await snapshots(image)).toEqual([])
  expect((await new ChainManager({ storage }).list()).backups).toEqual([])
})

test('a storage that fails before it reads fails the backup, and nothing else', async () => {
  class Failing extends LocalDriver {
    override async put(...args: Parameters<LocalDriver['put']>) {
      if (args[0].endsWith('.rbd-diff')) throw new Error('is full')
      return super.put(...args)
    }
  }
  const image = await site.create(8 * MIB)
  await site.write(image, 'write -P 1 0 8M')
  const pipeline = new BackupPipeline({
    host: hostOf({ vda: `rbd:${image}` }),
    storage: new Failing({ path: join(folder, 'storage'), create: true }),
    stateDir: stateDir(),
  })
  await expect(pipeline.run({ instance: 'web-1' })).rejects.toThrow('is full')
  expect(await snapshots(image)).toEqual([])
})

test('the streams, whose size nobody knows before, go to an SFTP server and come back', async () => {
  await using lab = await startSshd()
  const pathPrefix = join(lab.home, 'storage')
  await lab.makeFolder(pathPrefix)
  await using sftp = new SftpDriver({ ...(await login(lab)), pathPrefix })
  const image = await site.create(16 * MIB)
  const host = hostOf({ vda: `rbd:${image}` })
  const options = { host, storage: sftp, stateDir: stateDir() }
  await site.write(image, 'write -P 1 0 9M')
  await new BackupPipeline(options).run({ instance: 'web-1' })
  await site.write(image, 'write -P 2 8M 4M', 'discard 0 1M')
  const { id, kind } = await new BackupPipeline(options).run({ instance: 'web-1' })
  expect(kind).toBe('incremental')
  const path = join(folder, 'restored')
  await new RestorePipeline(options).run({ backup: id, to: { disks: { vda: path }, format: 'raw' } })
  expectSame(await readFile(path), await site.bytes(image))
})

test('an image in a group is not replaced by one that is in none', async () => {
  const image = await site.create(8 * MIB)
  const disks = { vda: `rbd:${image}` }
  const { id } = await backup(disks)
  await site.ceph.run('rbd', 'group', 'create', 'vms/together')
  await site.ceph.run('rbd', 'group', 'image', 'add', 'vms/together', image)
  const over: RestoreRequest = { backup: id, to: { disks, overwrite: true } }
  await expect(restore(over)).rejects.toMatchObject({
    code: 'DISK_UNSUPPORTED',
    message: expect.stringMatching(/in the group .*together.*in place/),
  })
  await restore({ ...over, to: { disks }, inPlace: true })
})

test('an image with clones is not replaced, and its backups go on', async () => {
  const image = await site.create(8 * MIB)
  const disks = { vda: `rbd:${image}` }
  await site.write(image, 'write -P 1 0 4M')
  const full = await backup(disks)
  const [clone, old] = [site.newImage(), site.newImage()]
  const first = `${image}@varve-${full.id}`
  await site.ceph.run('rbd', 'clone', '--rbd-default-clone-format', '2', first, clone)
  const wanted = await site.bytes(image)
  await site.write(image, 'write -P 2 0 1M')
  const before = await site.bytes(image)
  const over: RestoreRequest = { backup: full.id, to: { disks, overwrite: true } }
  await expect(restore(over)).rejects.toMatchObject({
    code: 'RBD_SNAPSHOT_PROTECTED',
    context: { clone },
  })
  expectSame(await site.bytes(image), before)
  await backup(disks)
  const third = await backup(disks) // the snapshot of the first one goes, as far as Ceph lets it
  expect(await snapshots(image)).not.toContain(`varve-${full.id}`)
  await expect(restore(over)).rejects.toMatchObject({ code: 'RBD_SNAPSHOT_PROTECTED' })
  await restore({ ...over, to: { disks }, inPlace: true })
  expectSame(await site.bytes(image), wanted)
  expectSame(await site.bytes(clone), wanted)

  // A clone of version 1 needs a snapshot that is protected, and so stays.
  const again = await backup(disks)
  await site.ceph.run('rbd', 'snap', 'protect', `${image}@varve-${again.id}`)
  await site.ceph.run('rbd', 'clone', '--rbd-default-clone-format', '1', `${image}@varve-${again.id}`, old)
  await backup(disks)
  const last = await backup(disks)
  expect(last.kind).toBe('incremental')
  expect(events).toContainEqual({
    type: 'warning',
    message: expect.stringContaining(`varve-${again.id} of ${image} is protected`),
  })
  expect(await snapshots(image)).toContain(`varve-${again.id}`)
  expect(third.kind).toBe('incremental')
  expect(await recover({ stateDir: stateDir(), storages: [storage], rbd })).toEqual({ runs: [], ok: true })
})

test('an image whose object map Ceph has found to be wrong is backed up right, and told of', async () => {
  const image = await site.create(16 * MIB, '--object-size', '1M')
  const disks = { vda: `rbd:${image}` }
  await site.write(image, 'write -P 1 0 9M')
  await backup(disks)
  await site.write(image, 'write -P 2 8M 4M', 'discard 0 1M')
  const { id } = await site.cluster.image(image)
  await site.ceph.run('rados', '-p', 'vms', 'rm', `rbd_object_map.${id}`)
  await site.write(image, 'write -P 3 5M 64k') // whoever takes the lock looks for the map
  expect(await site.ceph.run('rbd', 'info', image)).toContain('object map invalid')
  const next = await backup(disks)
  expect(next.kind).toBe('incremental')
  expectSame(await restoredBytes(next), await site.bytes(image))
  expect(events).toContainEqual({
    type: 'warning',
    message: expect.stringContaining('rbd object-map rebuild'),
  })
})

test('a stream or an index that was changed is refused, and nothing is restored', async () => {
  const image = await site.create(8 * MIB)
  await site.write(image, 'write -P 1 0 4M')
  const disks = { vda: `rbd:${image}` }
  const { id, chain } = await backup(disks)
  await site.write(image, 'write -P 2 0 4M')
  const now = await site.bytes(image)
  const inPlace = () => restore({ backup: id, to: { disks }, inPlace: true })
  for (const name of ['vda.rbd-diff', 'vda.index']) {
    const path = join(folder, 'storage', 'web-1', chain, id, name)
    const { stdout: size } = await execa('stat', ['-c', '%s', path])
    const at = Math.floor(Number(size) / 2)
    const flip = async () => {
      const bytes = await readFile(path)
      bytes[at] = (bytes[at] ?? 0) ^ 1
      await writeFile(path, bytes)
    }
    await flip()
    const target = join(folder, 'target.qcow2')
    await expect(restore({ backup: id, to: { disks: { vda: target } } })).rejects.toMatchObject({
      code: 'DIGEST_MISMATCH',
    })
    const { problems } = await new ChainManager({ storage }).verify(id, { deep: true })
    expect(problems.map(({ code, key }) => [code, key?.split('/').at(-1)])).toEqual([
      ['DIGEST_MISMATCH', name],
    ])
    // In place, of which the stream is not needed: the image has the backup's snapshot.
    if (name === 'vda.index') await expect(inPlace()).rejects.toMatchObject({ code: 'DIGEST_MISMATCH' })
    await flip()
  }
  // Nor is an image rolled back that QEMU cannot serve.
  const bin = join(folder, 'bin')
  await mkdir(bin)
  await writeFile(join(bin, 'qemu-nbd'), '#!/bin/sh\necho "Unknown protocol \'rbd\'" >&2\nexit 1\n', {
    mode: 0o755,
  })
  vi.stubEnv('PATH', `${bin}:${process.env.PATH}`)
  await expect(inPlace().finally(() => vi.unstubAllEnvs())).rejects.toMatchObject({
    code: 'NBD_SOCKET_MISSING',
    message: expect.stringContaining('qemu-block-extra'),
  })
  expectSame(await site.bytes(image), now)
  expect(await recover({ stateDir: stateDir(), storages: [storage], rbd })).toEqual({ runs: [], ok: true })
  await inPlace()
  expect((await site.bytes(image)).subarray(0, 4 * MIB).every(byte => byte === 1)).toBe(true)
})
