import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import {
  type BackupManifest,
  BackupPipeline,
  ChainManager,
  type Host,
  ImageHost,
  RestorePipeline,
  type RestoreRequest,
  recover,
  type VarveEvent,
} from '@varve/core'
import { LocalDriver } from '@varve/driver-local'
import { createQcow2, qemuIo, sha256Content } from '@varve/testkit/lab'
import { thoroughTest } from '@varve/testkit/thorough'
import { afterAll, afterEach, beforeAll, beforeEach, expect, test } from 'vitest'
import { newBackupId } from '../../core/src/backup-id.ts'
import { RunJournal } from '../../core/src/journal.ts'
import { abortAtStep } from '../../core/test/abort-at-step.ts'
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
  folder = await mkdtemp(join(tmpdir(), 'varve-rbd-aftermath-'))
  storage = new LocalDriver({ path: join(folder, 'storage'), create: true })
  events = []
})
afterEach(() => rm(folder, { recursive: true }))

const run = { onEvent: (event: VarveEvent) => void events.push(event) }
const warnings = () => events.flatMap(event => (event.type === 'warning' ? [event.message] : []))
const options = (host: Host) => ({ host, storage, stateDir: join(folder, 'state') })
const hostOf = (disks: Record<string, string>): Host => new ImageHost({ instance: 'web-1', disks, rbd })

function backup(disks: Record<string, string>): Promise<BackupManifest> {
  return new BackupPipeline(options(hostOf(disks))).run({ instance: 'web-1' }, run)
}

function inPlace(disks: Record<string, string>, { id }: BackupManifest, only?: string[]) {
  const request: RestoreRequest = { backup: id, to: { instance: 'web-1' }, inPlace: true }
  const pipeline = new RestorePipeline(options(hostOf(disks)))
  return pipeline.run({ ...request, ...(only && { disks: only }) }, run)
}

/** A disk of a backup, restored to a new raw file. */
async function restored({ id }: BackupManifest, disk: string): Promise<string> {
  const path = join(folder, `${id}-${disk}.raw`)
  const request: RestoreRequest = { backup: id, to: { disks: { [disk]: path }, format: 'raw' } }
  await new RestorePipeline(options(hostOf({}))).run(request, run)
  return path
}

const recoverAll = () => recover({ stateDir: join(folder, 'state'), storages: [storage], rbd }, run)

/** The journal of a run whose process has died. */
function unfinished(kind: 'backup' | 'restore', disks: Record<string, string>): Promise<RunJournal> {
  return RunJournal.begin(join(folder, 'state'), {
    version: 1,
    id: newBackupId(),
    kind,
    instance: 'web-1',
    host: hostOf(disks).reference,
    storage: { type: storage.type, location: storage.location },
    disks: Object.entries(disks).map(([name, path]) => ({ name, path })),
    startedAt: new Date().toISOString(),
  })
}

const kinds = ({ parent, disks }: BackupManifest) => [parent, ...disks.map(({ kind }) => kind)]

thoroughTest(
  'after a restore in place to an older backup the chains of an image and a file go on from that',
  async () => {
    const image = await site.create(8 * MIB)
    const file = join(folder, 'vdb.qcow2')
    await createQcow2(file, 8 * MIB)
    const disks = { vda: `rbd:${image}`, vdb: file }
    const change = async (byte: number) => {
      await site.write(image, `write -P ${byte} ${byte}M 3M`)
      await qemuIo(file, 'qcow2', [`write -P ${byte} ${byte}M 3M`])
    }
    await change(1)
    const first = await backup(disks)
    expect(Object.keys(first.tools)).toEqual(['varve', 'node', 'qemu', 'rbd'])
    expect(await site.ceph.run('ceph', '--version')).toContain(` ${first.tools.rbd} `)
    const wanted = await site.bytes(image)
    const wantedFile = await sha256Content(file, 'qcow2')
    await change(2)
    const second = await backup(disks)

    // One disk alone: both go on from the backup that the other one still shows.
    await inPlace(disks, first, ['vda'])
    const third = await backup(disks)
    expect(kinds(third)).toEqual([second.id, 'incremental', 'incremental'])

    await inPlace(disks, first)
    expect((await site.bytes(image)).equals(wanted)).toBe(true)
    expect(await sha256Content(file, 'qcow2')).toBe(wantedFile)
    await change(5)
    const fourth = await backup(disks)
    expect(kinds(fourth)).toEqual([first.id, 'incremental', 'incremental'])
    expect((await readFile(await restored(fourth, 'vda'))).equals(await site.bytes(image))).toBe(true)
    expect(await sha256Content(await restored(fourth, 'vdb'), 'raw')).toBe(await sha256Content(file, 'qcow2'))
    expect(warnings()).toEqual([])
  },
)

test('an image that is gone with its namespace is no longer on record as incomplete, and its snapshot is not told of', async () => {
  const image = 'vms/gone/disk'
  const disks = { vda: `rbd:${image}` }
  await site.ceph.run('rbd', 'namespace', 'create', 'vms/gone')
  await site.ceph.client.create(image, MIB)
  const { id } = await backup(disks)
  const request: RestoreRequest = { backup: id, to: { instance: 'web-1' }, inPlace: true }
  const restore = new RestorePipeline(options(hostOf(disks)))
  await expect(restore.run(request, { signal: abortAtStep('write-in-place') })).rejects.toMatchObject({
    context: { incomplete: ['vda'] },
  })
  expect(await recoverAll()).toMatchObject({ ok: false, runs: [{ outcome: 'incomplete' }] })
  await site.ceph.client.removeSnapshots(image, `varve-${id}`)
  await site.ceph.run('rbd', 'rm', '--no-progress', image)
  await site.ceph.run('rbd', 'namespace', 'remove', 'vms/gone')
  expect(await recoverAll()).toEqual({ ok: true, runs: [] })
  await new ChainManager(options(hostOf(disks))).delete(id, run)
  expect(warnings()).toEqual([])
})

test('recover leaves clones whole that rest on what an unfinished run has made', async () => {
  const [kept, hidden] = [await site.create(MIB), await site.create(MIB)]
  const disks = { vda: `rbd:${kept}`, vdb: `rbd:${hidden}` }
  const clone = async (snapshot: string, format: '1' | '2') => {
    const name = site.newImage()
    if (format === '1') await site.ceph.run('rbd', 'snap', 'protect', snapshot)
    await site.ceph.run('rbd', 'clone', '--rbd-default-clone-format', format, snapshot, name)
    return name
  }
  const holds = async (image: string, byte: number) => (await site.bytes(image)).every(one => one === byte)

  // A backup that died once its snapshots were taken.
  const mark = `varve-${newBackupId()}`
  const backupRun = await unfinished('backup', disks)
  const images = [kept, hidden].map((image, i) => ({ disk: ['vda', 'vdb'][i] ?? '', image }))
  await backupRun.record({ step: 'rbd-snapshot', snapshot: mark, disks: images })
  for (const image of [kept, hidden]) {
    await site.write(image, 'write -P 1 0 1M')
    await site.ceph.client.createSnapshot(image, mark)
  }
  const clones = [await clone(`${kept}@${mark}`, '1'), await clone(`${hidden}@${mark}`, '2')]
  for (const image of [kept, hidden]) await site.write(image, 'write -P 2 0 1M')
  expect(await recoverAll()).toMatchObject({ ok: true, runs: [{ outcome: 'undone' }] })
  expect(warnings()).toEqual([expect.stringContaining(`${mark} of ${kept} is protected`)])
  expect(await site.snapshots(kept)).toEqual([mark])
  expect(await site.cluster.snapshots(hidden)).toEqual([]) // but out of sight, as long as the clone needs it
  for (const image of clones) expect(await holds(image, 1)).toBe(true)

  // A restore that died before its new image was whole: that one stays as long as a clone needs it.
  const restoreRun = await unfinished('restore', disks)
  const made = `${kept}.varve-restore-${restoreRun.header.id}`
  await restoreRun.record({ step: 'image-create', image: made })
  await site.ceph.client.create(made, MIB)
  await site.write(made, 'write -P 3 0 1M')
  await site.ceph.client.createSnapshot(made, mark)
  const last = await clone(`${made}@${mark}`, '2')
  const unresolved = { outcome: 'unresolved', error: { code: 'RBD_SNAPSHOT_PROTECTED' } }
  expect(await recoverAll()).toMatchObject({ ok: false, runs: [unresolved] })
  await expect(backup(disks)).rejects.toMatchObject({ code: 'RUN_UNRESOLVED' })
  expect(await holds(last, 3)).toBe(true)
  await site.ceph.run('rbd', 'flatten', '--no-progress', last)
  expect(await recoverAll()).toMatchObject({ ok: true, runs: [{ outcome: 'undone' }] })
  expect(await site.cluster.imageId(made)).toBeUndefined()
  expect(await holds(last, 3)).toBe(true)
})

test('an image that comes although its restore died, as Ceph was slow to make it, does not stay', async () => {
  const image = site.newImage()
  const journal = await unfinished('restore', { vda: `rbd:${image}` })
  const temporary = `${image}.varve-restore-${journal.header.id}`
  await journal.record({ step: 'image-create', image: temporary })
  let coming: Promise<unknown> | undefined
  const onEvent = (event: VarveEvent) => {
    const hasLooked = event.type === 'command' && event.args.some(arg => arg.includes(journal.header.id))
    if (hasLooked) coming ??= site.ceph.run('rbd', 'create', temporary, '--size', '1M')
  }
  const report = await recover({ stateDir: join(folder, 'state'), storages: [storage], rbd }, { onEvent })
  await (coming ?? expect.fail('nobody has looked for the image'))
  expect(report).toMatchObject({ ok: true, runs: [{ outcome: 'undone' }] })
  expect(await site.cluster.imageId(temporary)).toBeUndefined()
})
