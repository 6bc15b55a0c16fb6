import { readdirSync, rmSync } from 'node:fs'
import { copyFile, mkdir, mkdtemp, open, readdir, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { LocalDriver } from '@varve/driver-local'
import { createQcow2, createRaw, qemuIo } from '@varve/testkit/lab'
import { afterAll, afterEach, beforeAll, beforeEach, expect, test } from 'vitest'
import { BackupPipeline } from '../src/backup-pipeline.ts'
import { ChainManager } from '../src/chain-manager.ts'
import { VarveError } from '../src/errors.ts'
import type { VarveEvent } from '../src/events.ts'
import { ImageHost } from '../src/image-host.ts'
import { recover } from '../src/recover.ts'
import type { StoredObject } from '../src/storage.ts'
import { PausingStorage } from './vm-site.ts'

let template: string
let folder: string
let pipeline: BackupPipeline
let parent: string
let storage: PublishingStorage
const chainFolder = (chain: string) => join(folder, 'storage', 'web-1', chain)

/** A storage on which something befalls a manifest that was just written. */
class PublishingStorage extends PausingStorage {
  afterManifest: ((path: string) => Promise<void>) | undefined
  /** What all but uploads fail with. */
  failure: VarveError | undefined
  /** The keys that were asked for one by one. */
  readonly asked: string[] = []
  /** What listings leave out as yet. */
  unlisted: RegExp | undefined

  override async put(...args: Parameters<PausingStorage['put']>): Promise<StoredObject> {
    const stored = await super.put(...args)
    if (args[0].endsWith('manifest.json')) await this.afterManifest?.(join(folder, 'storage', args[0]))
    return stored
  }

  override async stat(...args: Parameters<PausingStorage['stat']>): Promise<StoredObject | undefined> {
    this.asked.push(args[0])
    if (this.failure?.code === 'STORAGE_UNREACHABLE') throw this.failure
    return super.stat(...args)
  }

  override async *list(...args: Parameters<PausingStorage['list']>): AsyncGenerator<StoredObject> {
    for await (const object of super.list(...args)) if (!this.unlisted?.test(object.key)) yield object
  }

  override async delete(...args: Parameters<PausingStorage['delete']>): Promise<void> {
    if (this.failure) throw this.failure
    return super.delete(...args)
  }
}

beforeAll(async () => {
  template = await mkdtemp(join(tmpdir(), 'varve-publish-disk-'))
  await createQcow2(join(template, 'disk.qcow2'), 16 * 1024 * 1024)
  await qemuIo(join(template, 'disk.qcow2'), 'qcow2', ['write -P 0x11 0 4M'])
})
afterAll(() => rm(template, { recursive: true }))
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'varve-publish-'))
  const disk = join(folder, 'disk.qcow2')
  await mkdir(join(folder, 'storage'))
  await copyFile(join(template, 'disk.qcow2'), disk)
  storage = new PublishingStorage({ path: join(folder, 'storage') })
  pipeline = new BackupPipeline({
    host: new ImageHost({ instance: 'web-1', disks: { vda: disk } }),
    storage,
    stateDir: join(folder, 'state'),
  })
})
afterEach(() => rm(folder, { recursive: true }))

/** Takes a backup on whose upload something is removed from the storage by someone else, and returns its error. */
async function backupWhile(at: 'upload' | 'publish', remove: () => void): Promise<unknown> {
  const onEvent = (event: VarveEvent) => {
    if (event.type === 'stage' && event.stage === at) remove()
  }
  return pipeline.run({ instance: 'web-1' }, { onEvent }).catch((reason: unknown) => reason)
}

const left = async () =>
  (await readdir(join(folder, 'storage'), { recursive: true })).filter(name => /\.(json|qcow2)$/.test(name))

test('an increment whose parent was deleted during its upload is not published', async () => {
  const { id, chain } = await pipeline.run({ instance: 'web-1' })
  const error = await backupWhile('upload', () => rmSync(join(chainFolder(chain), id), { recursive: true }))
  expect(error).toMatchObject({ code: 'PARENT_MISSING', retryable: true })
  expect(await left()).toEqual([])
  expect(await readdir(join(folder, 'state', 'runs'))).toEqual([])
})

test('a backup that lost an image before its manifest is not published', async () => {
  const error = await backupWhile('publish', () => {
    for (const name of readdirSync(join(folder, 'storage'), { recursive: true, encoding: 'utf8' })) {
      if (name.endsWith('.qcow2')) rmSync(join(folder, 'storage', name))
    }
  })
  expect(error).toMatchObject({
    code: 'SIZE_MISMATCH',
    context: { key: expect.stringContaining('vda.qcow2') },
  })
  expect(await left()).toEqual([])
})

test('what a backup has stored is looked for by one listing, and what that does not show by itself', async () => {
  const { id, chain } = await pipeline.run({ instance: 'web-1' })
  const keyOf = (name: string) => `web-1/${chain}/${id}/${name}`
  expect(storage.asked).toEqual([keyOf('manifest.json')])
  storage.unlisted = /\.blake3$/
  const next = await pipeline.run({ instance: 'web-1', type: 'full' })
  const names = storage.asked.filter(key => key.includes(next.id)).map(key => key.split('/').at(-1))
  expect(names).toEqual(['vda.blake3', 'manifest.json'])
})

test('an increment whose parent is deleted while its manifest is written is taken back', async () => {
  const { id, chain } = await pipeline.run({ instance: 'web-1' })
  storage.beforePut = async key => {
    if (key.endsWith('manifest.json')) rmSync(join(chainFolder(chain), id), { recursive: true })
  }
  const error = await pipeline.run({ instance: 'web-1' }).catch((reason: unknown) => reason)
  expect(error).toMatchObject({ code: 'PARENT_MISSING', retryable: true })
  expect(await left()).toEqual([])
  expect(await readdir(join(folder, 'state', 'runs'))).toEqual([])
})

test('an increment whose parent somebody begins to delete while its manifest is written is taken back', async () => {
  const { id, chain } = await pipeline.run({ instance: 'web-1' })
  storage.beforePut = async key => {
    if (key.endsWith('manifest.json')) await writeFile(join(chainFolder(chain), id, 'deleting-0123abcd'), '')
  }
  const error = await pipeline.run({ instance: 'web-1' }).catch((reason: unknown) => reason)
  expect(error).toMatchObject({ code: 'PARENT_MISSING', retryable: true })
  expect((await left()).filter(name => name.endsWith('manifest.json'))).toHaveLength(1)
  // Nor is one begun on it.
  expect((await pipeline.run({ instance: 'web-1' })).disks[0]).toMatchObject({ fallback: 'parent-broken' })
})

/** Changes one bit of a file. */
async function flipBit(path: string, at: number): Promise<void> {
  const file = await open(path, 'r+')
  const { buffer } = await file.read(Buffer.alloc(1), 0, 1, at)
  await file.write(Buffer.from([(buffer[0] ?? 0) ^ 4]), 0, 1, at)
  await file.close()
}

test('a manifest that comes back altered makes no backup, also where it cannot be removed', async () => {
  const { id } = await pipeline.run({ instance: 'web-1' })
  storage.afterManifest = async path => {
    await flipBit(path, 10)
    storage.failure = new VarveError('STORAGE_ACCESS_DENIED', 'What is here stays.')
  }
  const warnings: string[] = []
  const onEvent = (event: VarveEvent) => event.type === 'warning' && warnings.push(event.message)
  await expect(pipeline.run({ instance: 'web-1' }, { onEvent })).rejects.toMatchObject({
    code: 'DIGEST_MISMATCH',
    context: { key: expect.stringContaining('manifest.json') },
  })
  expect(warnings).toEqual([expect.stringContaining('What is here stays.')])
  storage.afterManifest = storage.failure = undefined
  // What the next one needs of the parent is still there.
  expect(await pipeline.run({ instance: 'web-1' })).toMatchObject({ kind: 'incremental', parent: id })
})

test.each([
  ['as it was written', async () => undefined, 'finished'],
  ['altered', (path: string) => flipBit(path, 10), 'undone'],
  [
    'without the parent',
    (path: string) => rm(join(dirname(path), '..', parent), { recursive: true }),
    'undone',
  ],
] as const)(
  'a storage that is gone when the manifest is written, and has it later %s',
  async (_how, change, outcome) => {
    parent = (await pipeline.run({ instance: 'web-1' })).id
    let manifest = ''
    storage.afterManifest = async path => {
      manifest = path
      storage.failure = new VarveError('STORAGE_UNREACHABLE', 'It is off.', { retryable: true })
    }
    await expect(pipeline.run({ instance: 'web-1' })).rejects.toMatchObject({ code: 'RUN_UNRESOLVED' })
    storage.failure = undefined
    await change(manifest)
    const { runs } = await recover({ stateDir: join(folder, 'state'), storages: [storage] })
    expect(runs).toMatchObject([{ outcome }])
    const { backups, damaged } = await new ChainManager({ storage }).list()
    expect(damaged).toEqual([])
    const there = backups.map(backup => backup.manifest.id)
    expect(there.includes(dirname(manifest).split('/').at(-1) ?? '')).toBe(outcome === 'finished')
  },
)

test('a raw disk that is written to while it is read as one that is off is not published', async () => {
  const path = join(folder, 'disk.raw')
  await createRaw(path, 1024 * 1024)
  const host = new ImageHost({ instance: 'web-1', disks: { vda: path } })
  const raw = new BackupPipeline({ host, storage, stateDir: join(folder, 'state') })
  await raw.run({ instance: 'web-1' })
  storage.beforePut = async key => {
    if (key.endsWith('.qcow2')) await writeFile(path, 'a guest', { flag: 'r+' })
  }
  const error = await raw.run({ instance: 'web-1' }).catch((reason: unknown) => reason)
  expect(error).toMatchObject({ code: 'DISK_BUSY', context: { disk: 'vda' }, retryable: true })
  expect((await left()).filter(name => name.endsWith('manifest.json'))).toHaveLength(1)
})

test.each([1, 2])('with a limit of %d as many disks are uploaded at once, and no more', async limit => {
  const disks = Object.fromEntries(['vda', 'vdb', 'vdc'].map(name => [name, join(folder, `${name}.raw`)]))
  for (const path of Object.values(disks)) await writeFile(path, Buffer.alloc(1024 * 1024, 1))
  const all = Promise.withResolvers<void>()
  const counts: number[] = []
  let running = 0
  class CountingStorage extends LocalDriver {
    override async put(...args: Parameters<LocalDriver['put']>): Promise<StoredObject> {
      if (!args[0].endsWith('.qcow2')) return super.put(...args)
      counts.push(++running)
      if (running === limit) all.resolve()
      await all.promise
      return super.put(...args).finally(() => running--)
    }
  }
  const host = new ImageHost({ instance: 'web-1', disks })
  const counting = new CountingStorage({ path: join(folder, 'storage') })
  const raw = new BackupPipeline({ host, storage: counting, stateDir: join(folder, 'state') })
  await raw.run({ instance: 'web-1', concurrency: limit })
  expect(Math.max(...counts)).toBe(limit)
})

test.each(['vda.qcow2', 'vdb.qcow2', 'vdb.blake3'])(
  'where %s of two disks cannot be stored there is no backup, and nothing is left',
  async name => {
    const disks = Object.fromEntries(['vda', 'vdb'].map(disk => [disk, join(folder, `${disk}.raw`)]))
    for (const path of Object.values(disks)) await writeFile(path, Buffer.alloc(1024 * 1024, 1))
    const error = new VarveError('STORAGE_FULL', 'There is no room.')
    storage.beforePut = async key => {
      if (key.endsWith(`/${name}`)) throw error
    }
    const host = new ImageHost({ instance: 'web-1', disks })
    const two = new BackupPipeline({ host, storage, stateDir: join(folder, 'state') })
    await expect(two.run({ instance: 'web-1' })).rejects.toBe(error)
    expect(await readdir(join(folder, 'storage'))).toEqual([])
    expect(await readdir(join(folder, 'state', 'runs'))).toEqual([])
  },
)

test.each([
  ['type', 'differential'],
  ['freeze', 'yes'],
  ['verifyUpload', 'deep'],
])('%s %s is refused before anything is touched', async (name, value) => {
  const request = { instance: 'web-1', [name]: value }
  await expect(pipeline.run(request)).rejects.toMatchObject({
    code: 'INVALID_ARGUMENT',
    context: { [name]: value },
  })
})

test('verifyUpload by digest sees one bit that the storage changed, by size it does not', async () => {
  const flip = async (key: string) => {
    if (!key.endsWith('.blake3')) return
    await flipBit(join(folder, 'storage', key.replace('.blake3', '.qcow2')), 3 * 1024 * 1024)
  }
  storage.beforePut = flip
  await expect(pipeline.run({ instance: 'web-1', verifyUpload: 'digest' })).rejects.toMatchObject({
    code: 'DIGEST_MISMATCH',
  })
  expect(await left()).toEqual([])
  await pipeline.run({ instance: 'web-1', verifyUpload: 'size' })
})
