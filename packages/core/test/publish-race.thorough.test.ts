import { cp, mkdir, mkdtemp, readdir } from 'node:fs/promises'
import { join } from 'node:path'
import { LocalDriver } from '@varve/driver-local'
import { mountTmpfs, type Tmpfs } from '@varve/testkit/lab'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { ChainManager } from '../src/chain-manager.ts'
import { DiskLock } from '../src/disk-lock.ts'
import { ImageHost } from '../src/image-host.ts'
import { RunJournal } from '../src/journal.ts'
import type { BackupManifest } from '../src/manifest.ts'
import { publish } from '../src/publish-backup.ts'
import { recover } from '../src/recover.ts'
import { settleBackup } from '../src/settle-backup.ts'
import type { StorageDriver, StoredObject } from '../src/storage.ts'
import { backupFolder, MANIFEST_FILE } from '../src/storage-layout.ts'
import { dayId, storeFake } from './fake-backup.ts'

const [PARENT, OTHER, CHILD] = [dayId(1), dayId(2), dayId(3)]
const PARENT_FOLDER = backupFolder('web-1', PARENT, PARENT)
const CHILD_FOLDER = backupFolder('web-1', PARENT, CHILD)

let disk: Tmpfs
/** A storage with the parent, a newer backup in a chain of its own, and the objects of the child but for its manifest. */
let template: string
let parent: BackupManifest
let child: BackupManifest

beforeAll(async () => {
  disk = await mountTmpfs('size=128m') // in memory: each call of each case makes durable what it did
  template = join(disk.path, 'template')
  await mkdir(template)
  const storage = new LocalDriver({ path: template })
  parent = (await storeFake(storage, { id: PARENT })).manifest
  child = (await storeFake(storage, { id: CHILD, parent: PARENT, chain: PARENT })).manifest
  await storage.delete(`${CHILD_FOLDER}/${MANIFEST_FILE}`)
  await storeFake(storage, { id: OTHER })
})
afterAll(() => disk.dispose())

/** A folder on which each call is made when it is told to be. */
class SteppedStorage extends LocalDriver {
  readonly #waiting: (() => Promise<unknown>)[] = []
  #asked = Promise.withResolvers<true>()

  /** What was made so far. */
  readonly made: string[] = []

  /** Waits for the next call of `work`; false where `work` has ended. */
  async asked(work: Promise<unknown>): Promise<boolean> {
    const ended = work.then(() => false)
    while (this.#waiting.length === 0) if (!(await Promise.race([ended, this.#asked.promise]))) return false
    return true
  }

  /** Makes the next call of `work`; false where `work` has ended. */
  async step(work: Promise<unknown>): Promise<boolean> {
    if (!(await this.asked(work))) return false
    await this.#waiting.shift()?.()
    return true
  }

  #turn<T>(what: string, call: () => Promise<T>): Promise<T> {
    const { promise, resolve, reject } = Promise.withResolvers<T>()
    this.#waiting.push(() => {
      this.made.push(what)
      return call().then(resolve, reject)
    })
    this.#asked.resolve(true)
    this.#asked = Promise.withResolvers()
    return promise
  }

  override put(...args: Parameters<LocalDriver['put']>): Promise<StoredObject> {
    return this.#turn(`put ${args[0]}`, () => super.put(...args))
  }

  override get(...args: Parameters<LocalDriver['get']>): ReturnType<LocalDriver['get']> {
    return this.#turn(`get ${args[0]}`, () => super.get(...args))
  }

  override stat(...args: Parameters<LocalDriver['stat']>): ReturnType<LocalDriver['stat']> {
    return this.#turn(`stat ${args[0]}`, () => super.stat(...args))
  }

  override delete(...args: Parameters<LocalDriver['delete']>): Promise<void> {
    return this.#turn(`delete ${args[0]}`, () => super.delete(...args))
  }

  override async *list(...args: Parameters<LocalDriver['list']>): AsyncGenerator<StoredObject> {
    yield* await this.#turn(`list ${args[0]}`, async () => {
      const objects: StoredObject[] = []
      for await (const object of super.list(...args)) objects.push(object)
      return objects
    })
  }
}

/** All calls that are left. */
const ALL = Number.POSITIVE_INFINITY

/** Someone at work on a storage, call by call. */
class Actor<T> {
  readonly #storage: SteppedStorage
  readonly #work: Promise<{ result: T } | { error: unknown }>

  constructor(path: string, work: (storage: StorageDriver) => Promise<T>) {
    this.#storage = new SteppedStorage({ path })
    this.#work = work(this.#storage).then(
      result => ({ result }),
      error => ({ error }),
    )
  }

  /** Makes so many calls more, or as many as there are, and waits until the next one is due. */
  async go(calls = ALL): Promise<readonly string[]> {
    for (let made = 0; made < calls; made++) if (!(await this.#storage.step(this.#work))) break
    await this.#storage.asked(this.#work)
    return this.#storage.made
  }

  /** All that is left to do, and how it ended. */
  async end(): Promise<{ result: T } | { error: unknown }> {
    await this.go()
    return this.#work
  }
}

/** Publishes the child as a backup does whose objects are stored, and tells whether it is a backup then. */
async function publishChild(storage: StorageDriver, stateDir: string): Promise<boolean> {
  const host = new ImageHost({ instance: 'web-1', disks: {} })
  const startedAt = new Date()
  const journal = await RunJournal.begin(stateDir, {
    version: 1,
    id: CHILD,
    kind: 'backup',
    instance: 'web-1',
    host: host.reference,
    storage: { type: storage.type, location: storage.location },
    disks: [],
    startedAt: startedAt.toISOString(),
  })
  await journal.record({ step: 'upload', folder: CHILD_FOLDER })
  const backup = {
    ...{ id: CHILD, folder: CHILD_FOLDER, host, storage, journal, startedAt, run: {} },
    instance: { name: 'web-1', primary: undefined, running: false, disks: [], unsupported: new Map() },
    request: { instance: 'web-1' },
    plan: { parent: { manifest: parent, folder: PARENT_FOLDER }, disks: [] },
    overlays: [],
    lock: await DiskLock.acquire([]),
  }
  let failure: unknown
  await publish(backup, child, { bitmaps: {}, snapshots: {} }).catch(error => {
    failure = error
  })
  const { published } = await settleBackup(journal, { host, storage, run: {} })
  if (!published) expect(failure).toMatchObject({ code: 'PARENT_MISSING' })
  return published
}

/** How a parent may be deleted: resolves with whether it was. */
const DELETIONS: Record<string, (storage: StorageDriver) => Promise<boolean>> = {
  delete: storage =>
    new ChainManager({ storage }).delete(PARENT).then(
      () => true,
      error => {
        expect(error).toMatchObject({ code: 'CHAIN_DEPENDENCY' })
        return false
      },
    ),
  prune: async storage => {
    const { removed } = await new ChainManager({ storage }).prune({ keepLast: 1 })
    return removed.some(({ manifest }) => manifest.id === PARENT)
  },
}

type Who = 'publication' | 'deletion'

/** In which order the two make their calls: each number is how many more, and the last to come makes all that are left. */
type Order = readonly (readonly [Who, number])[]

interface Case {
  readonly order: Order
  /** Who is killed after the last of these calls. */
  readonly dies?: Who
}

/** Plays a case on a storage of its own; throws what is wrong with what is there afterwards. */
async function play(
  deletes: (storage: StorageDriver) => Promise<boolean>,
  { order, dies }: Case,
): Promise<string> {
  const folder = await mkdtemp(join(disk.path, 'case-'))
  const path = join(folder, 'storage')
  const stateDir = join(folder, 'state')
  await cp(template, path, { recursive: true })
  const actors = {
    publication: new Actor(path, storage => publishChild(storage, stateDir)),
    deletion: new Actor(path, deletes),
  }
  for (const actor of Object.values(actors)) await actor.go(0)
  for (const [who, calls] of order) await actors[who].go(calls)
  const outcome = async (who: Who): Promise<boolean | undefined> => {
    if (who === dies) return undefined
    const end = await actors[who].end()
    if ('error' in end) throw end.error
    return end.result
  }
  const last = order.at(-1)?.[0]
  const ends: Partial<Record<Who, boolean | undefined>> = {}
  for (const who of last === 'deletion'
    ? (['deletion', 'publication'] as const)
    : (['publication', 'deletion'] as const))
    ends[who] = await outcome(who)

  const storage = new LocalDriver({ path })
  const host = new ImageHost({ instance: 'web-1', disks: {} })
  expect(await recover({ stateDir, storages: [storage], host })).toMatchObject({ ok: true })
  const chains = new ChainManager({ storage })
  const { backups, damaged } = await chains.list()
  const there = backups.map(({ manifest }) => manifest.id)
  expect(damaged).toEqual([])
  for (const id of there) expect(await chains.verify(id)).toMatchObject({ ok: true })
  const [isChild, isParent] = [CHILD, PARENT].map(id => there.includes(id))
  if (isChild) expect(isParent).toBe(true)
  if (ends.publication !== undefined) expect(isChild).toBe(ends.publication)
  if (ends.deletion !== undefined) expect(isParent).toBe(!ends.deletion)
  const left = (await readdir(path, { recursive: true })).filter(name => name.includes(CHILD))
  expect(left.length > 0).toBe(isChild)
  return isChild ? 'child' : isParent ? 'parent' : 'neither'
}

/** The calls of one alone. */
async function callsOf(
  work: (storage: StorageDriver, stateDir: string) => Promise<boolean>,
): Promise<readonly string[]> {
  const folder = await mkdtemp(join(disk.path, 'alone-'))
  const path = join(folder, 'storage')
  await cp(template, path, { recursive: true })
  return new Actor(path, storage => work(storage, join(folder, 'state'))).go()
}

test.each(Object.entries(DELETIONS))(
  'whatever calls a publication has made when its parent is deleted (%s), and the other way round, no backup is without what it rests on',
  async (kind, deletes) => {
    const publication = (await callsOf(publishChild)).length
    // Once the manifest of the parent is gone the rest of it makes no difference.
    const deletion = (await callsOf(deletes)).indexOf(`delete ${PARENT_FOLDER}/${MANIFEST_FILE}`) + 1
    expect(publication).toBeGreaterThan(8)
    expect(deletion).toBeGreaterThan(4)
    const seen = new Set<string>()
    for (let p = 0; p <= publication; p++) {
      for (let d = 0; d <= deletion; d++) {
        const one: Order = [
          ['publication', p],
          ['deletion', d],
        ]
        const cases: Case[] = [
          { order: [...one, ['publication', ALL]] },
          { order: [...one.toReversed(), ['deletion', ALL]] },
        ]
        if (kind === 'delete')
          cases.push({ order: one, dies: 'deletion' }, { order: one.toReversed(), dies: 'publication' })
        for (const each of cases) {
          const came = await play(deletes, each).catch(cause => {
            throw new Error(JSON.stringify(each), { cause })
          })
          seen.add(came)
        }
      }
    }
    // That neither of them comes to its end takes a death.
    expect([...seen].sort()).toEqual(
      kind === 'delete' ? ['child', 'neither', 'parent'] : ['child', 'neither'],
    )
  },
)
