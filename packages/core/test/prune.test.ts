import { randomUUID } from 'node:crypto'
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import fc from 'fast-check'
import { beforeEach, describe, expect, it, onTestFinished } from 'vitest'
import { newBackupId } from '../src/backup-id.ts'
import { ChainManager } from '../src/chain-manager.ts'
import { VarveError } from '../src/errors.ts'
import type { VarveEvent } from '../src/events.ts'
import { ImageHost } from '../src/image-host.ts'
import { RunJournal } from '../src/journal.ts'
import type { PrunePolicy, PruneReport } from '../src/prune.ts'
import { bytesBody } from '../src/storage.ts'
import { dayId, storeFake, storeFakeChain } from './fake-backup.ts'
import { WatchedStorage } from './watched-storage.ts'

let storage: WatchedStorage
let chains: ChainManager
beforeEach(() => {
  storage = new WatchedStorage()
  chains = new ChainManager({ storage })
})

const HOUR = 60 * 60 * 1000
const ago = (ms: number) => new Date(Date.now() - ms)

/** The ids that a report speaks of. */
function told({ kept, removed, damaged }: PruneReport) {
  return {
    kept: kept.map(({ backup }) => backup.manifest.id),
    removed: removed.map(({ manifest }) => manifest.id),
    damaged: damaged.map(({ folder }) => folder.split('/').at(-1)),
  }
}

async function listed(): Promise<string[]> {
  return (await chains.list()).backups.map(({ manifest }) => manifest.id)
}

/** The id of a backup that began so long ago. */
function idAgo(ms: number): string {
  const [day = '', time = ''] = ago(ms).toISOString().split('T')
  return `${day.replaceAll('-', '')}-${time.slice(0, 8).replaceAll(':', '')}-000-abcdef`
}

describe('pruning', () => {
  it('removes what the policy does not keep, with every object of it', async () => {
    const folders = await storeFakeChain(storage, [1, 2])
    await storeFakeChain(storage, [3, 4])
    const report = await chains.prune({ keepLast: 1 })
    expect(told(report)).toEqual({ kept: [dayId(3), dayId(4)], removed: [dayId(2), dayId(1)], damaged: [] })
    expect(report.kept.map(({ reasons }) => reasons)).toEqual([['ancestor'], ['last']])
    expect(storage.keys.filter(key => folders.some(folder => key.startsWith(folder)))).toEqual([])
    expect(await listed()).toEqual([dayId(3), dayId(4)])
  })

  it('removes children before their parents, and each manifest before the rest', async () => {
    const folders = await storeFakeChain(storage, [1, 2])
    await storeFakeChain(storage, [3])
    await chains.prune({ keepLast: 1 })
    const deletions = storage.calls.filter(call => call.startsWith('delete')).map(call => call.slice(7))
    const firstOf = (folder = '') => deletions.findIndex(key => key.startsWith(folder))
    expect(firstOf(folders[1])).toBeLessThan(firstOf(folders[0]))
    for (const folder of folders) expect(deletions[firstOf(folder)]).toBe(`${folder}/manifest.json`)
  })

  it('applies the policy to each instance by itself', async () => {
    await storeFakeChain(storage, [1, 2], { instance: 'quiet' })
    for (const day of [10, 11, 12]) await storeFakeChain(storage, [day], { instance: 'busy' })
    expect(told(await chains.prune({ keepLast: 2 })).removed).toEqual([dayId(10)])
  })

  it('counts days as they were, also where all ids follow one from a clock that was ahead', async () => {
    const ahead = newBackupId(undefined, new Date('2127-11-06T02:00:00Z'))
    const ids = [ahead]
    for (let day = 1; day <= 14; day++) {
      const startedAt = new Date(Date.UTC(2026, 10, day, 2))
      const id = newBackupId(ids.at(-1), startedAt)
      await storeFake(storage, { id, startedAt })
      ids.push(id)
    }
    const weekBefore = ids[1] ?? '' // the 1st was a Sunday
    const report = await chains.prune({ keepDaily: 7, keepWeekly: 3 })
    expect(told(report).kept).toEqual([weekBefore, ...ids.slice(-7)])
  })

  it('counts the backups of two instances with one name by themselves, and keeps what rests on the other', async () => {
    const [one, other] = [randomUUID(), randomUUID()]
    const store = (day: number, uuid: string, parent?: number) =>
      storeFake(storage, {
        id: dayId(day),
        uuid,
        ...(parent && { parent: dayId(parent), chain: dayId(parent) }),
      })
    await store(1, one)
    await store(2, one)
    await store(3, other)
    await store(4, other)
    expect(told(await chains.prune({ keepLast: 1 }))).toMatchObject({ kept: [dayId(2), dayId(4)] })
    await store(5, one)
    await store(6, other, 2) // defined anew, the instance goes on from its disks' bitmaps
    expect(told(await chains.prune({ keepLast: 1 }))).toMatchObject({
      kept: [dayId(2), dayId(5), dayId(6)],
      removed: [dayId(4)],
    })
  })

  it('of one instance leaves the others alone', async () => {
    for (const day of [1, 2]) await storeFakeChain(storage, [day], { instance: 'web' })
    for (const day of [3, 4]) await storeFakeChain(storage, [day], { instance: 'web-1' })
    const report = await chains.prune({ keepLast: 1, instance: 'web' })
    expect(told(report)).toEqual({ kept: [dayId(2)], removed: [dayId(1)], damaged: [] })
    expect(await listed()).toEqual([dayId(2), dayId(3), dayId(4)])
  })

  it('in a dry run tells the same and changes nothing', async () => {
    await storeFakeChain(storage, [1, 2])
    await storeFakeChain(storage, [3])
    await storage.put(`web-1/${dayId(4)}/${dayId(4)}/vda.qcow2`, bytesBody(Buffer.from('left over')))
    storage.setModified('', ago(48 * HOUR))
    const before = storage.keys
    const dry = await chains.prune({ keepLast: 1 }, { dryRun: true })
    expect(storage.keys).toEqual(before)
    expect(storage.cleanedUp).toBeUndefined()
    expect(dry.dryRun).toBe(true)
    const real = await chains.prune({ keepLast: 1 })
    expect(real).toEqual({ ...dry, dryRun: false, unfinishedUploads: 3 })
    expect(real.garbage).toHaveLength(1)
  })

  it.each<PrunePolicy>([
    {},
    { instance: 'web-1' },
    { keepLast: 0 },
    { keepLast: 1, timeZone: 'Nowhere' },
    { keepLast: 1, garbageAgeMs: 0 },
    { keepLast: 1, garbageAgeMs: HOUR - 1 },
    { keepLast: 1, garbageAgeMs: Number.NaN },
    { keepLast: 1, garbageAgeMs: Infinity },
    { keepLast: 1, instance: '' },
  ])('refuses the policy %j before it asks the storage', async policy => {
    await expect(chains.prune(policy)).rejects.toMatchObject({ code: 'INVALID_ARGUMENT' })
    expect(storage.calls).toEqual([])
  })

  it('goes on after it broke off', async () => {
    const folders = await storeFakeChain(storage, [1, 2, 3])
    await storeFakeChain(storage, [9])
    storage.intercept = call => {
      if (call === `delete ${folders[1]}/vda.qcow2`) throw new VarveError('STORAGE_UNREACHABLE', 'Gone.')
    }
    await expect(chains.prune({ keepLast: 1 })).rejects.toMatchObject({ code: 'STORAGE_UNREACHABLE' })
    expect(await listed()).toEqual([dayId(1), dayId(9)])

    storage.intercept = undefined
    storage.setModified('', ago(48 * HOUR))
    const report = await chains.prune({ keepLast: 1 })
    expect(told(report).removed).toEqual([dayId(1)])
    expect(report.garbage.map(({ folder }) => folder)).toEqual([folders[1]])
    expect(storage.keys.every(key => key.includes(dayId(9)))).toBe(true)
  })

  it('tells what it removed although leftovers stay, with a warning of each, and goes on behind them', async () => {
    await storeFakeChain(storage, [1])
    await storeFakeChain(storage, [9])
    const [refused, removed] = [4, 5].map(day => `web-1/${dayId(day)}/${dayId(day)}`)
    for (const folder of [refused, removed])
      await storage.put(`${folder}/vda.qcow2`, bytesBody(Buffer.from('x')))
    storage.setModified('', ago(48 * HOUR))
    const denied = new VarveError('STORAGE_ACCESS_DENIED', 'Not yours.')
    storage.intercept = call => {
      if (call === `delete ${refused}/vda.qcow2`) throw denied
    }
    storage.cleanUp = () => Promise.reject(denied)
    const warnings: string[] = []
    const onEvent = (event: VarveEvent) => {
      if (event.type === 'warning') warnings.push(event.message)
    }
    const report = await chains.prune({ keepLast: 1 }, { onEvent })
    expect(told(report).removed).toEqual([dayId(1)])
    expect(report.garbage.map(({ folder }) => folder)).toEqual([removed])
    expect(report.unfinishedUploads).toBe(0)
    expect(warnings.sort()).toEqual([
      'Unfinished uploads may stay until a later prune: Not yours.',
      `What is left over in ${refused} stays until a later prune: Not yours.`,
    ])
  })

  it('asks a storage that is silent for no more leftovers', async () => {
    await storeFakeChain(storage, [1])
    for (const day of [4, 5])
      await storage.put(`web-1/${dayId(day)}/${dayId(day)}/vda.qcow2`, bytesBody(Buffer.from('x')))
    storage.setModified('', ago(48 * HOUR))
    const silent = new VarveError('TIMEOUT', 'No answer.', { retryable: true })
    storage.intercept = call => {
      if (call.startsWith('delete')) throw silent
    }
    expect(await chains.prune({ keepLast: 1 })).toMatchObject({ garbage: [], unfinishedUploads: 0 })
    expect(storage.calls.filter(call => call.startsWith('delete'))).toHaveLength(1)
    expect(storage.cleanedUp).toBeUndefined()
  })

  it('spares a chain in which a backup was published meanwhile', async () => {
    await storeFakeChain(storage, [1, 2])
    await storeFakeChain(storage, [3])
    const elsewhere = new WatchedStorage()
    await storeFake(elsewhere, { id: dayId(4), parent: dayId(1), chain: dayId(1) })
    storage.intercept = call => {
      if (!call.startsWith(`get web-1/${dayId(3)}`)) return
      for (const [key, bytes] of elsewhere.objects) storage.objects.set(key, bytes)
    }
    const report = await chains.prune({ keepLast: 1 })
    expect(told(report)).toEqual({ kept: [dayId(3), dayId(2), dayId(1)], removed: [], damaged: [] })
    expect(report.kept.slice(1).map(({ reasons }) => reasons)).toEqual([['ancestor'], ['ancestor']])
    expect(await chains.resolve(dayId(4))).toHaveLength(2)
  })

  it('keeps what a backup rests on that it spared for another one, though that one is gone again', async () => {
    const [, folder = ''] = await storeFakeChain(storage, [1, 2])
    await storeFakeChain(storage, [3])
    const elsewhere = new WatchedStorage()
    await storeFake(elsewhere, { id: dayId(4), parent: dayId(2), chain: dayId(1) })
    storage.intercept = call => {
      if (call.startsWith(`put ${folder}/deleting-`))
        for (const [key, bytes] of elsewhere.objects) storage.objects.set(key, bytes)
      if (call.startsWith(`delete ${folder}/deleting-`))
        for (const key of elsewhere.keys) storage.objects.delete(key) // it saw the mark
    }
    const report = await chains.prune({ keepLast: 1 })
    expect(told(report)).toEqual({ kept: [dayId(3), dayId(2), dayId(1)], removed: [], damaged: [] })
    expect(await chains.resolve(dayId(2))).toHaveLength(2)
  })

  it('ends when it is given up', async () => {
    for (const day of [1, 2, 3]) await storeFakeChain(storage, [day])
    const controller = new AbortController()
    storage.intercept = call => {
      if (call.startsWith('delete')) controller.abort()
    }
    await expect(chains.prune({ keepLast: 1 }, { signal: controller.signal })).rejects.toMatchObject({
      code: 'ABORTED',
    })
    expect(await listed()).toHaveLength(2)
  })

  it('never breaks a chain that it keeps, and has nothing left to do afterwards', {
    timeout: 60_000,
  }, async () => {
    const forest = fc.array(fc.option(fc.nat({ max: 20 }), { nil: undefined, freq: 5 }), { maxLength: 12 })
    const policy = fc
      .record({
        keepLast: fc.nat({ max: 3 }),
        keepWeekly: fc.nat({ max: 2 }),
        keepMonthly: fc.nat({ max: 2 }),
      })
      .filter(policy => Object.values(policy).some(count => count > 0))
    await fc.assert(
      fc.asyncProperty(forest, policy, async (parents, policy) => {
        storage = new WatchedStorage()
        chains = new ChainManager({ storage })
        const stored: { id: string; chain: string }[] = []
        for (const [index, parent] of parents.entries()) {
          const base = parent === undefined ? undefined : stored[parent % Math.max(1, index)]
          const id = dayId(index * 5 + 1)
          stored.push({ id, chain: base?.chain ?? id })
          await storeFake(storage, { id, parent: base?.id, chain: base?.chain })
        }
        const report = await chains.prune(policy)
        const left = await listed()
        expect([...left, ...told(report).removed].sort()).toEqual(stored.map(({ id }) => id))
        expect(left).toEqual(told(report).kept)
        for (const id of left) await chains.resolve(id)
        expect(told(await chains.prune(policy))).toEqual({ kept: left, removed: [], damaged: [] })
      }),
      { numRuns: 30 },
    )
  })
})

describe('pruning where something is damaged', () => {
  it.each<[string, (folder: string) => void]>([
    ['a manifest', folder => storage.damage(`${folder}/manifest.json`, () => Buffer.from('{'))],
    [
      'a newer manifest',
      folder => storage.damage(`${folder}/manifest.json`, () => Buffer.from('{"version":2}')),
    ],
    ['a lost manifest', folder => storage.objects.delete(`${folder}/manifest.json`)],
    ['a lost image', folder => storage.objects.delete(`${folder}/vda.qcow2`)],
    ['a short image', folder => storage.damage(`${folder}/vda.qcow2`, bytes => bytes.subarray(1))],
    ['a lost list of digests', folder => storage.objects.delete(`${folder}/vda.blake3`)],
  ])('leaves the whole chain alone and tells of it: %s', async (_, damage) => {
    await storeFakeChain(storage, [1])
    const folders = await storeFakeChain(storage, [2, 3, 4])
    await storeFakeChain(storage, [5])
    await storeFakeChain(storage, [6])
    damage(folders[1] ?? '')
    storage.setModified('', ago(48 * HOUR))
    const before = storage.keys

    const report = await chains.prune({ keepLast: 1 })
    expect(told(report).removed).toEqual([dayId(5), dayId(1)])
    expect(report.damaged.length).toBeGreaterThan(0)
    expect(report.damaged.every(({ folder }) => folders.includes(folder))).toBe(true)
    expect(report.garbage).toEqual([])
    const gone = before.filter(key => !storage.keys.includes(key))
    expect(gone.every(key => key.includes(dayId(1)) || key.includes(dayId(5)))).toBe(true)
  })

  it('leaves a chain alone whose newest manifest is damaged, though none rests on that', async () => {
    const folders = await storeFakeChain(storage, [1, 2])
    await storeFakeChain(storage, [3])
    storage.damage(`${folders[1]}/manifest.json`, () => Buffer.from('{'))
    const report = await chains.prune({ keepLast: 1 })
    expect(told(report)).toEqual({ kept: [dayId(1), dayId(3)], removed: [], damaged: [dayId(2)] })
    expect(report.damaged[0]?.error.code).toBe('MANIFEST_INVALID')
  })

  it('leaves both chains alone where a forged backup has the id of another one', async () => {
    await storeFakeChain(storage, [1, 2, 3])
    await storeFake(storage, { id: dayId(3), parent: dayId(0), chain: dayId(0) })
    await storeFakeChain(storage, [5])
    const before = storage.keys
    const report = await chains.prune({ keepLast: 1 })
    expect(told(report).removed).toEqual([])
    expect(new Set(report.damaged.map(({ error }) => error.code))).toEqual(new Set(['MANIFEST_INVALID']))
    expect(storage.keys).toEqual(before)
  })

  it('keeps as many undamaged backups as the policy says', async () => {
    for (const day of [1, 2, 3]) await storeFakeChain(storage, [day])
    const [newest] = await storeFakeChain(storage, [4])
    storage.objects.delete(`${newest}/vda.qcow2`)
    const report = await chains.prune({ keepLast: 2 })
    expect(told(report)).toEqual({
      kept: [dayId(2), dayId(3), dayId(4)],
      removed: [dayId(1)],
      damaged: [dayId(4)],
    })
    expect(report.kept.at(-1)?.reasons).toEqual(['damaged'])
    expect(report.damaged[0]?.error.code).toBe('OBJECT_NOT_FOUND')
  })
})

describe('garbage', () => {
  /** A folder as a run leaves it that died after its first image. */
  async function leftOver(id: string, writtenAgo: number | undefined): Promise<string> {
    const { folder } = await storeFake(storage, { id })
    storage.objects.delete(`${folder}/manifest.json`)
    storage.setModified(folder, writtenAgo === undefined ? undefined : ago(writtenAgo))
    return folder
  }

  async function garbageOf(policy: Partial<PrunePolicy> = {}): Promise<string[]> {
    const { garbage } = await chains.prune({ keepLast: 1, ...policy })
    return garbage.map(({ folder }) => folder)
  }

  it('is a folder without a manifest in which nothing was written for a day', async () => {
    const folder = await leftOver(idAgo(50 * HOUR), 25 * HOUR)
    const report = await chains.prune({ keepLast: 1 })
    expect(report.garbage).toEqual([{ folder, objects: 3, bytes: expect.any(Number) }])
    expect(report.garbage[0]?.bytes).toBeGreaterThan(100)
    expect(storage.keys).toEqual([])
  })

  it('is not what was written to within the day, however old the rest is', async () => {
    const folder = await leftOver(idAgo(50 * HOUR), 25 * HOUR)
    storage.setModified(`${folder}/vda.blake3`, ago(23 * HOUR))
    expect(await garbageOf()).toEqual([])
  })

  it('is not what began within the day, whatever the clock of the storage says', async () => {
    await leftOver(idAgo(23 * HOUR), 999 * HOUR)
    expect(await garbageOf()).toEqual([])
  })

  it('is not what a run of this machine stores that is not settled, nor is its upload, however long that takes', async () => {
    const stateDir = await mkdtemp(join(tmpdir(), 'varve-prune-'))
    onTestFinished(() => rm(stateDir, { recursive: true }))
    const startedAt = ago(30 * HOUR)
    const [id, dead] = [newBackupId(undefined, startedAt), idAgo(50 * HOUR)]
    const folder = await leftOver(id, 29 * HOUR)
    const other = await leftOver(dead, 29 * HOUR)
    const host = new ImageHost({ instance: 'web-1', disks: {} })
    const { type, location } = storage
    const begin = (id: string, kind: 'backup' | 'restore') =>
      RunJournal.begin(stateDir, {
        ...{ version: 1, id, kind, instance: 'web-1', disks: [] },
        ...{ host: host.reference, storage: { type, location }, startedAt: startedAt.toISOString() },
      })
    const journal = await begin(id, 'backup')
    await begin(idAgo(99 * HOUR), 'restore') // such as one that has left a disk incomplete: it uploads nothing
    chains = new ChainManager({ storage, host, stateDir })
    expect(await garbageOf()).toEqual([other])
    expect(storage.keys.filter(key => key.startsWith(folder))).toHaveLength(3)
    expect(storage.cleanedUp?.olderThan).toEqual(startedAt)
    await expect(chains.delete(id)).rejects.toMatchObject({ code: 'BACKUP_NOT_FOUND' })

    await journal.settled()
    expect(await garbageOf()).toEqual([folder])
  })

  it('is no upload of a run that is not settled either where its id is from a clock that was ahead, or where the run cannot be read', async () => {
    const stateDir = await mkdtemp(join(tmpdir(), 'varve-prune-'))
    onTestFinished(() => rm(stateDir, { recursive: true }))
    const host = new ImageHost({ instance: 'web-1', disks: {} })
    const { type, location } = storage
    const [id, startedAt] = [newBackupId(undefined, ago(-999 * HOUR)), ago(30 * HOUR)]
    await RunJournal.begin(stateDir, {
      ...{ version: 1, id, kind: 'backup', instance: 'web-1', disks: [], startedAt: startedAt.toISOString() },
      ...{ host: host.reference, storage: { type, location } },
    })
    chains = new ChainManager({ storage, host, stateDir })
    await chains.prune({ keepLast: 1 })
    expect(storage.cleanedUp?.olderThan).toEqual(startedAt)

    await writeFile(join(stateDir, 'runs', `${id}.jsonl`), 'nothing of a journal\n')
    await chains.prune({ keepLast: 1 })
    expect(storage.cleanedUp?.olderThan).toEqual(new Date(0))
  })

  it('is told by what was written where the id is from a clock that was ahead', async () => {
    const ahead = (ms: number) => newBackupId(undefined, ago(-ms))
    const folder = await leftOver(ahead(999 * HOUR), 25 * HOUR)
    await leftOver(ahead(2 * HOUR), 23 * HOUR)
    await leftOver(ahead(3 * HOUR), undefined)
    expect(await garbageOf()).toEqual([folder])
  })

  it('is told by the id where the storage tells no times', async () => {
    const old = await leftOver(idAgo(25 * HOUR), undefined)
    await leftOver(idAgo(23 * HOUR), undefined)
    expect(await garbageOf()).toEqual([old])
  })

  it('has the age that the policy says', async () => {
    const folder = await leftOver(idAgo(50 * HOUR), 3 * HOUR)
    expect(await garbageOf({ garbageAgeMs: 4 * HOUR })).toEqual([])
    expect(await garbageOf({ garbageAgeMs: 2 * HOUR })).toEqual([folder])
  })

  it('is not a folder whose manifest appears meanwhile', async () => {
    const { folder } = await storeFake(storage, { id: idAgo(50 * HOUR) })
    const manifest = storage.objects.get(`${folder}/manifest.json`) ?? expect.fail()
    storage.objects.delete(`${folder}/manifest.json`)
    storage.setModified(folder, ago(25 * HOUR))
    storage.intercept = call => {
      if (call.startsWith('stat')) storage.objects.set(`${folder}/manifest.json`, manifest)
    }
    expect(await garbageOf()).toEqual([])
    expect(storage.keys).toHaveLength(4)
  })

  it('is not a folder to which something is written meanwhile', async () => {
    const folder = await leftOver(idAgo(50 * HOUR), 25 * HOUR)
    storage.intercept = call => {
      if (call.startsWith('stat')) storage.setModified(`${folder}/vda.qcow2`, new Date())
    }
    expect(await garbageOf()).toEqual([])
    expect(storage.keys).toHaveLength(3)
  })

  it('is not a backup whose manifest a listing leaves out', async () => {
    const { folder } = await storeFake(storage, { id: idAgo(50 * HOUR) })
    storage.setModified(folder, ago(25 * HOUR))
    const list = storage.list.bind(storage)
    storage.list = async function* (prefix, options) {
      for await (const object of list(prefix, options))
        if (!object.key.endsWith('manifest.json')) yield object
    }
    expect(await garbageOf()).toEqual([])
    expect(storage.keys).toHaveLength(4)
  })

  it('is nothing that Varve did not write', async () => {
    for (const key of ['notes.txt', 'web-1/notes.txt', `web-1/${dayId(1)}/notes.txt`, 'a/b/c/d']) {
      await storage.put(key, bytesBody(Buffer.from('x')))
    }
    storage.setModified('', ago(999 * HOUR))
    const before = storage.keys
    expect(await garbageOf()).toEqual([])
    expect(storage.keys).toEqual(before)
  })

  it('of another instance is left alone when one is pruned', async () => {
    await leftOver(idAgo(50 * HOUR), 25 * HOUR)
    expect(await garbageOf({ instance: 'web-2' })).toEqual([])
  })

  it('has the storage remove uploads that were never finished, by the same age', async () => {
    const report = await chains.prune({ keepLast: 1, garbageAgeMs: 5 * HOUR })
    expect(report.unfinishedUploads).toBe(3)
    const age = Date.now() - (storage.cleanedUp?.olderThan.getTime() ?? 0)
    expect(Math.round(age / HOUR)).toBe(5)
  })
})
