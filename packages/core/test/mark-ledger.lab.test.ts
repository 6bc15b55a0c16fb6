import { once } from 'node:events'
import { cp, mkdir, mkdtemp, readdir, rename, rm, utimes, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { LocalDriver } from '@varve/driver-local'
import { createQcow2 } from '@varve/testkit/lab'
import { execa, type ResultPromise } from 'execa'
import { afterEach, beforeEach, expect, test } from 'vitest'
import { BackupPipeline } from '../src/backup-pipeline.ts'
import { ChainManager } from '../src/chain-manager.ts'
import { VarveError } from '../src/errors.ts'
import type { VarveEvent } from '../src/events.ts'
import { ImageHost } from '../src/image-host.ts'
import { MarkLedger } from '../src/mark-ledger.ts'
import { RestorePipeline } from '../src/restore-pipeline.ts'
import type { StoredObject } from '../src/storage.ts'

let folder: string
let host: ImageHost
let events: VarveEvent[]
const stateDir = () => join(folder, 'state')
const storage = (name: string) => new LocalDriver({ path: join(folder, name) })

beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'varve-marks-'))
  const disk = join(folder, 'disk.qcow2')
  await createQcow2(disk, 1024 * 1024)
  await mkdir(join(folder, 'a'))
  await mkdir(join(folder, 'b'))
  host = new ImageHost({ instance: 'web-1', disks: { vda: disk } })
  events = []
})
afterEach(() => rm(folder, { recursive: true }))

const backup = (to: string) =>
  new BackupPipeline({ host, storage: storage(to), stateDir: stateDir() }).run(
    { instance: 'web-1' },
    { onEvent: event => void events.push(event) },
  )
const remove = (from: string, id: string) => new ChainManager({ storage: storage(from) }).delete(id)
const marks = async () => {
  const { disks } = await host.instance('web-1')
  return disks.flatMap(disk => ('bitmaps' in disk ? disk.bitmaps.map(({ name }) => name) : [])).sort()
}
const markOf = ({ id }: { id: string }) => `varve-${id}`

test('the bitmap of a deleted backup goes with the next backup to its storage, and with no other', async () => {
  const a1 = await backup('a')
  const a2 = await backup('a')
  const b1 = await backup('b')
  await remove('a', a2.id)
  const b2 = await backup('b')
  expect(b2.parent).toBe(b1.id)
  expect(await marks()).toEqual([a2, b2].map(markOf))
  expect(events.filter(({ type }) => type === 'warning')).toEqual([])

  const a3 = await backup('a')
  expect(await marks()).toEqual([b2, a3].map(markOf))
  expect(events).toContainEqual({ type: 'warning', message: expect.stringContaining(markOf(a2)) })
  const b3 = await backup('b')
  expect(b3.parent).toBe(b2.id)

  // What has gone from the disks is not remembered for ever.
  const a4 = await backup('a')
  expect((await readdir(join(stateDir(), 'marks', 'web-1'))).sort()).toEqual(
    [b2, a3, b3, a4].map(({ id }) => `${id}.json`),
  )
  expect(a1.id < a2.id).toBe(true)
})

test('a storage that is not mounted takes no bitmap of its backups away', async () => {
  await backup('a')
  const a2 = await backup('a')
  await rename(join(folder, 'a'), join(folder, 'elsewhere'))
  await mkdir(join(folder, 'a'))
  const stray = await backup('a')
  expect(await marks()).toEqual([a2, stray].map(markOf))
  await rm(join(folder, 'a'), { recursive: true })
  await rename(join(folder, 'elsewhere'), join(folder, 'a'))
  expect((await backup('a')).parent).toBe(a2.id)
})

test('the bitmap of a backup that was restored and then deleted goes too', async () => {
  const a1 = await backup('a')
  const a2 = await backup('a')
  const pipeline = new RestorePipeline({ host, storage: storage('a'), stateDir: join(folder, 'fresh') })
  const disks = { vda: join(folder, 'disk.qcow2') }
  await pipeline.run({ backup: a2.id, to: { disks, overwrite: true } })
  expect(await marks()).toEqual([markOf(a2)])
  await remove('a', a2.id)
  const next = await new BackupPipeline({ host, storage: storage('a'), stateDir: join(folder, 'fresh') }).run(
    {
      instance: 'web-1',
    },
  )
  expect(next).toMatchObject({ kind: 'full' })
  expect(await marks()).toEqual([markOf(next)])
  expect(a1.chain).toBe(a2.chain)
})

test('a restore for practice, or from a copy on another storage, leaves the record of where a backup went', async () => {
  const a1 = await backup('a')
  await cp(join(folder, 'a'), join(folder, 'b'), { recursive: true })
  const ledger = new MarkLedger(stateDir(), 'web-1')
  const restore = (stateDir: string, path: string) =>
    new RestorePipeline({ host, storage: storage('b'), stateDir }).run({
      backup: a1.id,
      to: { disks: { vda: path }, overwrite: true },
    })
  await restore(stateDir(), join(folder, 'practice.qcow2'))
  await restore(stateDir(), join(folder, 'disk.qcow2'))
  expect(await ledger.storageOf(a1.id)).toEqual({ type: 'local', location: join(folder, 'a') })
  await restore(join(folder, 'fresh'), join(folder, 'again.qcow2'))
  expect(await new MarkLedger(join(folder, 'fresh'), 'web-1').storageOf(a1.id)).toBeUndefined()

  await remove('b', a1.id)
  await backup('b')
  expect(await marks()).toContain(markOf(a1))
  expect(await backup('a')).toMatchObject({ parent: a1.id })
})

test('a storage is the same one whether its path was written with a slash at its end or not', async () => {
  const ledger = new MarkLedger(stateDir(), 'web-1')
  const id = '20260101-000000-000-cccccc'
  await ledger.add(id, { type: 'local', location: '/mnt/a/' })
  expect(await ledger.backupsOn({ type: 'local', location: '/mnt/a' })).toEqual([id])
  expect(await ledger.backupsOn({ type: 'local', location: '/mnt/ab' })).toEqual([])
})

test('two runs may remember one backup at the same time', async () => {
  const ledger = new MarkLedger(stateDir(), 'web-1')
  const id = '20260101-000000-000-cccccc'
  await Promise.all(Array.from({ length: 50 }, () => ledger.add(id, storage('a'))))
  expect(await readdir(join(stateDir(), 'marks', 'web-1'))).toEqual([`${id}.json`])
})

test('what a process left that died while it remembered a backup goes with a backup an hour later', async () => {
  const marks = join(stateDir(), 'marks', 'web-1')
  await mkdir(marks, { recursive: true })
  const [old, young, next] = [
    '20260101-000000-000-aaaaaa',
    '20260101-000000-000-bbbbbb',
    '20260101-000000-000-cccccc',
  ]
  for (const id of [old, young]) await writeFile(join(marks, `${id}.json.tmp`), '{"type":')
  const anHourAgo = new Date(Date.now() - 61 * 60 * 1000)
  await utimes(join(marks, `${old}.json.tmp`), anHourAgo, anHourAgo)
  await new MarkLedger(stateDir(), 'web-1').add(next, storage('a'))
  expect((await readdir(marks)).sort()).toEqual([`${young}.json.tmp`, `${next}.json`])
})

test('a record that cannot be forgotten makes a backup fail that says that it is good', async () => {
  const first = await backup('a')
  await backup('a')
  const record = join(stateDir(), 'marks', 'web-1', `${first.id}.json`)
  class Spoiling extends LocalDriver {
    /** Once the ledger has been read: a folder is removed by no means that is for files. */
    override async put(...args: Parameters<LocalDriver['put']>): Promise<StoredObject> {
      await rm(record, { recursive: true })
      await mkdir(record)
      return super.put(...args)
    }
  }
  const pipeline = new BackupPipeline({
    host,
    storage: new Spoiling({ path: join(folder, 'a') }),
    stateDir: stateDir(),
  })
  const error = await pipeline.run({ instance: 'web-1' }).catch((error: unknown) => error)
  const { backups } = await new ChainManager({ storage: storage('a') }).list()
  expect(error).toMatchObject({
    code: 'STATE_DIR_FAILED',
    context: { path: record, published: backups.at(2)?.manifest.id },
  })
  expect(backups).toHaveLength(3)
})

test('a backup whose manifest is stored, though its upload failed, is told of as good where its marks cannot be changed', async () => {
  let user: ResultPromise | undefined
  const useDisk = async () => {
    user = execa('qemu-io', ['-f', 'qcow2', join(folder, 'disk.qcow2')], { stdin: 'pipe' })
    user.stdin?.write('length\n')
    if (user.stdout) await once(user.stdout, 'data') // it has opened the disk
  }
  class Breaking extends LocalDriver {
    override async put(...args: Parameters<LocalDriver['put']>): Promise<StoredObject> {
      const stored = await super.put(...args)
      if (!args[0].endsWith('/manifest.json')) return stored
      await useDisk()
      throw new VarveError('STORAGE_UNREACHABLE', 'The answer was lost.')
    }
  }
  const pipeline = new BackupPipeline({
    ...{ host, storage: new Breaking({ path: join(folder, 'a') }), stateDir: stateDir() },
  })
  const error = await pipeline.run({ instance: 'web-1' }).catch((error: unknown) => error)
  user?.stdin?.end('quit\n')
  await user
  const { backups } = await new ChainManager({ storage: storage('a') }).list()
  expect(error).toMatchObject({
    context: { published: backups[0]?.manifest.id },
    message: expect.stringMatching(/is complete, and this came after: The answer was lost/),
  })
})
