import { appendFile, mkdir, mkdtemp, rm, utimes, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, expect, test } from 'vitest'
import { newBackupId } from '../src/backup-id.ts'
import { DiskLock, runLock } from '../src/disk-lock.ts'
import { VarveError } from '../src/errors.ts'
import type { Host } from '../src/host.ts'
import { ImageHost } from '../src/image-host.ts'
import { type JournalHeader, RunJournal } from '../src/journal.ts'
import type { RbdCluster } from '../src/rbd.ts'
import { recover } from '../src/recover.ts'
import { bytesBody } from '../src/storage.ts'
import { MemoryStorage } from './memory-storage.ts'

let stateDir: string
let storage: MemoryStorage
beforeEach(async () => {
  stateDir = await mkdtemp(join(tmpdir(), 'varve-recover-'))
  storage = new MemoryStorage()
})
afterEach(() => rm(stateDir, { recursive: true }))

function begin(
  instance: string,
  id = newBackupId(),
  location: string = storage.location,
): Promise<RunJournal> {
  const header: JournalHeader = {
    version: 1,
    id,
    kind: 'backup',
    instance,
    host: { kind: 'image', instance, disks: {} },
    storage: { type: storage.type, location },
    disks: [{ name: 'vda', path: join(stateDir, `${instance}.qcow2`) }],
    startedAt: new Date().toISOString(),
  }
  return RunJournal.begin(stateDir, header)
}

/** A host on which something happens in the middle. */
class BusyHost {
  readonly merged: string[] = []
  onResume = async (): Promise<void> => undefined
  onThaw = async (): Promise<void> => undefined

  /** What is not told here, it does as the host of plain images does. */
  asHost(): Host {
    const host: Host = new ImageHost({ instance: 'web-1', disks: {} })
    host.resume = () => this.onResume()
    host.thawFilesystems = () => this.onThaw()
    host.commitOverlay = async (_, { overlay }) => void this.merged.push(overlay)
    return host
  }
}

test('a run that is settled while another one is recovered keeps its backup', async () => {
  const dead = await begin('web-1')
  await dead.record({ step: 'suspend' })
  const live = await begin('web-2')
  const folder = `web-2/${live.header.id}/${live.header.id}`
  await live.record({ step: 'upload', folder })
  await storage.put(`${folder}/vda.qcow2`, bytesBody(Buffer.from('image')))
  const host = new BusyHost()
  host.onResume = async () => {
    await storage.put(`${folder}/manifest.json`, bytesBody(Buffer.from('{}')))
    await live.settled()
  }
  const { runs } = await recover({ stateDir, storages: [storage], host: host.asHost() })
  expect(runs).toEqual([{ id: dead.header.id, kind: 'backup', instance: 'web-1', outcome: 'undone' }])
  expect([...storage.objects.keys()].sort()).toEqual([`${folder}/manifest.json`, `${folder}/vda.qcow2`])
})

test('a run with snapshots of RBD images stays until recover is told how to reach their cluster, as its error says', async () => {
  const dead = await begin('web-1')
  const disks = [{ disk: 'vda', image: 'vms/web-1' }]
  await dead.record({ step: 'rbd-snapshot', snapshot: `varve-${dead.header.id}`, disks })
  const unresolved = await recover({ stateDir, storages: [storage] })
  expect(unresolved).toMatchObject({
    ok: false,
    runs: [
      { outcome: 'unresolved', error: { message: expect.stringMatching(/recover.*rbd: new CephConnector/) } },
    ],
  })
  const removed: string[] = []
  const cluster: Partial<RbdCluster> = {
    removeSnapshots: async (image, names) => void removed.push(...names.map(name => `${image}@${name}`)),
  }
  const rbd = { cluster: () => cluster as RbdCluster }
  expect(await recover({ stateDir, storages: [storage], rbd })).toMatchObject({ ok: true })
  expect(removed).toEqual([`vms/web-1@varve-${dead.header.id}`])
})

test('a run that did more while another one was recovered, and died, is settled with all that it did', async () => {
  const dead = await begin('web-1')
  await dead.record({ step: 'suspend' })
  const late = await begin('web-2')
  const folder = `web-2/${late.header.id}/${late.header.id}`
  const host = new BusyHost()
  host.onResume = async () => {
    await late.record({ step: 'upload', folder })
    await storage.put(`${folder}/vda.qcow2`, bytesBody(Buffer.from('image')))
  }
  const { runs } = await recover({ stateDir, storages: [storage], host: host.asHost() })
  expect(runs).toMatchObject([{ outcome: 'undone' }, { outcome: 'undone' }])
  expect([...storage.objects.keys()]).toEqual([])
})

test('a journal that cannot be read is told of, and keeps no other run from being settled', async () => {
  const unreadable = await begin('web-1')
  await appendFile(join(stateDir, 'runs', `${unreadable.header.id}.jsonl`), 'not json\n')
  const other = await begin('web-2')
  const report = await recover({ stateDir, storages: [storage] })
  expect(report).toMatchObject({
    ok: false,
    runs: [
      { id: unreadable.header.id, outcome: 'unresolved', error: { code: 'RUN_UNRESOLVED' } },
      { id: other.header.id, instance: 'web-2', outcome: 'undone' },
    ],
  })
  expect(await RunJournal.unsettled(stateDir)).toEqual([unreadable.header.id])
})

test('a journal whose process died before its header was whole goes an hour later', async () => {
  const begun = await Promise.all(
    ['', '{"version":1', '{"version":1'].map(async (text, index) => {
      const id = newBackupId()
      const path = join(stateDir, 'runs', `${id}.jsonl`)
      await mkdir(join(stateDir, 'runs'), { recursive: true })
      await writeFile(path, text)
      const age = index < 2 ? 61 : 59
      const minutesAgo = new Date(Date.now() - age * 60 * 1000)
      await utimes(path, minutesAgo, minutesAgo)
      return id
    }),
  )
  const dead = await begin('web-1')
  await utimes(join(stateDir, 'runs', `${dead.header.id}.jsonl`), 0, 0)
  const report = await recover({ stateDir, storages: [storage] })
  expect(report).toMatchObject({ ok: true, runs: [{ id: dead.header.id, outcome: 'undone' }] })
  expect(await RunJournal.unsettled(stateDir)).toEqual([begun[2]])
})

test('a guest that cannot be resumed or thawed is told of, and its overlays are merged all the same', async () => {
  const dead = await begin('web-1')
  await dead.record({ step: 'filesystem-freeze' })
  await dead.record({ step: 'suspend' })
  const overlay = { disk: 'vda', base: '/img/vda', baseFormat: 'qcow2', overlay: '/img/vda.overlay' } as const
  await dead.record({ step: 'snapshot', overlays: [overlay] })
  await dead.record({ step: 'export', folder: join(stateDir, 'none') })
  const host = new BusyHost()
  host.onThaw = () => Promise.reject(new VarveError('FREEZE_FAILED', 'The agent does not answer.'))
  host.onResume = () => Promise.reject(new VarveError('RESUME_FAILED', 'Stands still.'))
  const recovering = () => recover({ stateDir, storages: [storage], host: host.asHost() })
  expect((await recovering()).runs).toMatchObject([
    { outcome: 'unresolved', error: { code: 'RESUME_FAILED' } },
  ])
  expect(host.merged).toEqual([overlay.overlay])
  host.onResume = async () => undefined
  expect((await recovering()).runs).toMatchObject([
    { outcome: 'unresolved', error: { code: 'FREEZE_FAILED' } },
  ])
  host.onThaw = async () => undefined
  expect((await recovering()).runs).toMatchObject([{ outcome: 'undone' }])
})

test('a backup that its own run has seen published is one, whatever became of what it rests on', async () => {
  const dead = await begin('web-1')
  const publication = { manifest: 'web-1/x/y/manifest.json', size: 7, blake3: 'b', parent: 'web-1/x/x' }
  await dead.record({ step: 'publish', ...publication, retire: {} })
  expect((await recover({ stateDir, storages: [] })).runs).toMatchObject([{ outcome: 'unresolved' }])
  await dead.record({ step: 'published' })
  expect((await recover({ stateDir, storages: [] })).runs).toMatchObject([{ outcome: 'finished' }])
})

test('a storage is known again though its path was written with a slash at its end', async () => {
  const dead = await begin('web-1', newBackupId(), `${storage.location}/`)
  const publication = { manifest: 'web-1/x/y/manifest.json', size: 7, blake3: 'b', parent: 'web-1/x/x' }
  await dead.record({ step: 'publish', ...publication, retire: {} })
  expect((await recover({ stateDir, storages: [] })).runs).toMatchObject([{ outcome: 'unresolved' }])
  expect((await recover({ stateDir, storages: [storage] })).runs).toMatchObject([{ outcome: 'undone' }])
})

test('a run is said to go on as long as its own process lives, and not for another one that holds its disk', async () => {
  const { header } = await begin('web-1')
  const recovered = async () => (await recover({ stateDir, storages: [storage] })).runs
  await using another = await DiskLock.acquire(header.disks.map(({ path }) => path))
  const message = expect.stringMatching(
    /ended before it was done.* or it goes on .* before Varve was updated/,
  )
  const busy = { outcome: 'unresolved', error: { code: 'DISK_BUSY', retryable: true, message } }
  expect(await recovered()).toMatchObject([busy])
  {
    await using _process = await DiskLock.acquire([runLock(header.id)])
    expect(await recovered()).toEqual([
      { id: header.id, kind: 'backup', instance: 'web-1', outcome: 'running' },
    ])
  }
  await another.release()
  expect(await recovered()).toMatchObject([{ outcome: 'undone' }])
})
