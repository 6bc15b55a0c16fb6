import { FaultyDriver } from '@varve/testkit'
import { BackupPipeline } from '../../src/backup-pipeline.ts'
import { ChainManager } from '../../src/chain-manager.ts'
import { VarveError } from '../../src/errors.ts'
import type { BackupManifest, FallbackReason } from '../../src/manifest.ts'
import { DEFAULT_MAX_INCREMENTAL_CHAIN } from '../../src/parent-check.ts'
import { RestorePipeline } from '../../src/restore-pipeline.ts'
import { expectContent } from './expect-content.ts'
import { expectNoOtherObjects } from './expect-objects.ts'
import { expectCleanState } from './expect-state.ts'
import { DISKS, type DiskName, INSTANCE } from './guest.ts'
import type { ProvingGround, StorageName } from './proving-ground.ts'
import { Random } from './random.ts'

/** How often each kind of step is taken, of the sum of all. */
const STEPS = {
  write: 8,
  backup: 6,
  'full backup': 1,
  'backup that fails': 2,
  'backups behind a listing that lags': 1,
  'backup of one disk': 1,
  restore: 2,
  'restore in place': 1,
  'restore that fails': 1,
  compare: 2,
  delete: 1,
  prune: 1,
  grow: 1,
  shrink: 1,
  'shrink and grow': 1,
  restart: 2,
} as const
type StepName = keyof typeof STEPS

const MOST_BYTES = 12 * 1024 * 1024
const LEAST_BYTES = 1024 * 1024
const CLUSTER = 64 * 1024

/** What a backup of all disks must be: an increment on this one, or full for this reason. */
type Next = { readonly parent: string } | { readonly fallback: FallbackReason }

/**
 * Takes an instance through random steps, beside what each disk and each backup must hold, and compares. Rejects with
 * the steps so far where one differs.
 */
export class ModelWalk {
  readonly log: string[] = []
  readonly #ground: ProvingGround
  readonly #random: Random
  /** The backups that are there, by storage, oldest first. */
  readonly #there: Record<StorageName, BackupManifest[]> = { first: [], second: [] }
  /** What the next backup to a storage must be; undefined where that takes more than this model to tell. */
  readonly #next: Record<StorageName, Next | undefined> = {
    first: { fallback: 'no-parent' },
    second: { fallback: 'no-parent' },
  }

  /** The disks that shrank and grew again since the newest backup on a storage: a seal that had bits only there has none. */
  readonly #cut = { first: new Set<string>(), second: new Set<string>() }

  constructor(ground: ProvingGround, seed: number) {
    this.#ground = ground
    this.#random = new Random(seed)
  }

  async run(steps: number): Promise<void> {
    await this.#ground.clear()
    if (this.#ground.hasDomain) await this.#ground.start()
    try {
      for (let step = 0; step < steps; step++) await this.#step(this.#choose())
      for (const name of ['first', 'second'] as const) {
        await this.#compareList(name)
        for (const backup of this.#there[name]) await this.#compare(name, backup)
      }
      await this.#ground.stop()
      expectContent('the disks in the end', await this.#ground.stored(), this.#ground.content)
    } catch (error) {
      throw new Error(`${this.log.join('\n')}\n${error instanceof Error ? error.message : error}`, {
        cause: error,
      })
    }
  }

  #choose(): StepName {
    const names = Object.entries(STEPS).flatMap(([name, often]) => Array<string>(often).fill(name))
    return this.#random.pick(names) as StepName
  }

  async #step(name: StepName): Promise<void> {
    this.log.push(name)
    const storage = this.#random.pick(['first', 'second'] as const)
    const [ground, random] = [this.#ground, this.#random]
    const there = this.#there[storage]
    const some = there.length > 0 ? random.pick(there) : undefined
    switch (name) {
      case 'write':
        return ground.write(random)
      case 'backup':
        return this.#addAuto(storage, await ground.backup(storage))
      case 'full backup':
        return this.#add(storage, await ground.backup(storage, { type: 'full' }))
      case 'backups behind a listing that lags':
        return this.#lag(storage)
      case 'backup of one disk':
        return this.#addOneDisk(storage, random.pick(DISKS))
      case 'backup that fails':
        return this.#fail(storage)
      case 'restore':
        return some && this.#restore(storage, some, false)
      case 'restore in place':
        return some && this.#fits(some) ? this.#restore(storage, some, true) : undefined
      case 'restore that fails':
        return some && this.#failToRestore(storage, some)
      case 'compare':
        return some && this.#compare(storage, some)
      case 'delete':
        return this.#delete(storage)
      case 'prune':
        return this.#prune(storage)
      case 'grow':
      case 'shrink':
      case 'shrink and grow':
        return this.#resize(name)
      case 'restart':
        await ground.stop()
        if (ground.hasDomain && !random.oneIn(3)) await ground.start()
    }
  }

  /** The storage fails at some call. */
  async #fail(storage: StorageName): Promise<void> {
    const { host, stateDir } = this.#ground
    const left = this.#random.below(6)
    const kind = this.#random.pick(['fail-before', 'fail-after'] as const)
    let puts = 0
    const error = new VarveError('STORAGE_FULL', 'There is no room.')
    const faulty = new FaultyDriver(this.#ground.storage(storage), ({ operation }) =>
      operation === 'put' && puts++ === left ? { kind, error } : undefined,
    )
    const pipeline = new BackupPipeline({ host, stateDir, storage: faulty })
    const manifest = await pipeline.run({ instance: INSTANCE }).catch(found => {
      if (found !== error && found?.code !== 'STORAGE_FULL') throw found
      return undefined
    })
    if (manifest) this.#addAuto(storage, manifest) // it needed fewer objects, or the manifest was stored
    await this.#expectNothingLeft(storage)
  }

  /** The second one does not see the first, or sees but a part of it. */
  async #lag(storage: StorageName): Promise<void> {
    const { host, stateDir } = this.#ground
    const changes = 1 + this.#random.below(8)
    let lags = false
    const lagging = new FaultyDriver(this.#ground.storage(storage), ({ operation }) =>
      lags && operation === 'list' ? { kind: 'stale', changes } : undefined,
    )
    const pipeline = new BackupPipeline({ host, stateDir, storage: lagging })
    this.#addAuto(storage, await pipeline.run({ instance: INSTANCE }))
    await this.#ground.write(this.#random)
    lags = true
    this.#add(storage, await pipeline.run({ instance: INSTANCE }))
    this.#next[storage] = undefined
  }

  async #addOneDisk(storage: StorageName, disk: DiskName): Promise<void> {
    this.#add(storage, await this.#ground.backup(storage, { disks: [disk] }), [disk])
    this.#next[storage] = undefined
  }

  /** One of all disks, whose kind was not asked for. */
  #addAuto(storage: StorageName, manifest: BackupManifest): void {
    const next = this.#next[storage]
    const cut = new Set(this.#cut[storage])
    this.#add(storage, manifest)
    if (!next) return
    const parent = 'parent' in next && this.#hasRoom(storage, next.parent) ? next.parent : undefined
    const reason = 'fallback' in next ? next.fallback : 'chain-limit'
    const wanted = parent === undefined ? `full ${reason}` : `incremental on ${parent}`
    for (const { name, kind, fallback } of manifest.disks) {
      const found = kind === 'full' ? `full ${fallback}` : `incremental on ${manifest.parent}`
      if (found === 'full bitmap-altered' && cut.has(name)) continue
      if (found !== wanted) throw new Error(`${name} is ${found} and not ${wanted}`)
    }
  }

  /** Whether the chain that a backup ends may have one more. */
  #hasRoom(storage: StorageName, id: string): boolean {
    return this.#withAncestors(storage, [id]).length <= DEFAULT_MAX_INCREMENTAL_CHAIN
  }

  /** These backups and all that they rest on. */
  #withAncestors(storage: StorageName, ids: readonly string[]): string[] {
    const found = new Set(ids)
    for (const { id, parent } of this.#there[storage].toReversed())
      if (parent !== undefined && found.has(id)) found.add(parent)
    return [...found]
  }

  #add(storage: StorageName, manifest: BackupManifest, disks?: readonly DiskName[]): void {
    this.#ground.remember(manifest.id, disks)
    const kinds = manifest.disks.map(({ name, kind, fallback }) => `${name} ${kind} ${fallback ?? ''}`)
    this.log.push(`  ${manifest.id} on ${storage}: ${kinds.join(', ')}`)
    this.#there[storage].push(manifest)
    this.#next[storage] = { parent: manifest.id }
    this.#cut[storage].clear()
  }

  /** What a full backup is for where its storage has none that fits; undefined where the newest has not all disks. */
  #noParent(storage: StorageName): Next | undefined {
    const newest = this.#there[storage].at(-1)
    if (!newest) return { fallback: 'no-parent' }
    return newest.disks.length === DISKS.length ? { fallback: 'bitmap-missing' } : undefined
  }

  /** Nothing of a run that failed is on the host, nor on its storage. */
  async #expectNothingLeft(storage: StorageName): Promise<void> {
    const ground = this.#ground
    await expectCleanState(ground.stateDir)
    await expectNoOtherObjects(ground.storage(storage), undefined)
    const files = await ground.files()
    if (files.join() !== DISKS.map(disk => `${disk}.qcow2`).join()) throw new Error(`there are ${files}`)
    for (const { name, path } of (await ground.host.disks(INSTANCE)).disks)
      if (!DISKS.some(disk => disk === name && ground.image(disk) === path))
        throw new Error(`${name} is on ${path}`)
  }

  async #restore(storage: StorageName, { id, disks }: BackupManifest, inPlace: boolean): Promise<void> {
    this.log.push(`  ${id} on ${storage}`)
    const { host, stateDir } = this.#ground
    const pipeline = new RestorePipeline({ host, stateDir, storage: this.#ground.storage(storage) })
    const wanted = this.#ground.backups.get(id) ?? {}
    await pipeline.run({ backup: id, to: { instance: INSTANCE }, powerOffTimeoutMs: 0, inPlace })
    this.#ground.content = wanted
    const isWhole = disks.length === DISKS.length
    this.#next[storage] = isWhole ? { parent: id } : undefined
    if (inPlace) return // which the bitmaps of the other storage record
    const other = storage === 'first' ? 'second' : 'first'
    this.#next[other] = isWhole ? this.#noParent(other) : undefined
  }

  /** The storage fails at some call, and the disks stay as they were. */
  async #failToRestore(storage: StorageName, { id }: BackupManifest): Promise<void> {
    const { host, stateDir } = this.#ground
    const error = new VarveError('STORAGE_UNREACHABLE', 'Nobody answers.')
    const faulty = new FaultyDriver(this.#ground.storage(storage), ({ operation, key }) =>
      operation === 'get' && key.endsWith('.qcow2') ? { kind: 'fail-before', error } : undefined,
    )
    const pipeline = new RestorePipeline({ host, stateDir, storage: faulty })
    const failed = await pipeline.run({ backup: id, to: { instance: INSTANCE }, powerOffTimeoutMs: 0 }).then(
      () => false,
      () => true,
    )
    if (!failed) throw new Error('a restore without its images succeeded')
    await this.#expectNothingLeft(storage)
  }

  /** Beyond its end a restore in place leaves a larger disk as it is. */
  #fits({ id }: BackupManifest): boolean {
    const [now, then] = [this.#ground.content, this.#ground.backups.get(id) ?? {}]
    return Object.entries(then).every(([disk, bytes]) => now[disk]?.byteLength === bytes.byteLength)
  }

  async #compare(storage: StorageName, manifest: BackupManifest): Promise<void> {
    const wanted = this.#ground.backups.get(manifest.id) ?? {}
    expectContent(`${manifest.id} on ${storage}`, await this.#ground.restored(storage, manifest), wanted)
  }

  async #compareList(name: StorageName): Promise<void> {
    const { backups } = await new ChainManager({ storage: this.#ground.storage(name) }).list()
    const [found, wanted] = [
      backups.map(({ manifest }) => manifest.id),
      this.#there[name].map(({ id }) => id),
    ]
    if (found.join() !== wanted.join()) throw new Error(`${name} holds ${found} and not ${wanted}`)
  }

  /** The newest, as others may rest on an older one. */
  async #delete(storage: StorageName): Promise<void> {
    const last = this.#there[storage].at(-1)
    if (!last) return
    await new ChainManager({ storage: this.#ground.storage(storage) }).delete(last.id)
    this.#remove(storage, [last.id])
  }

  #remove(storage: StorageName, ids: readonly string[]): void {
    this.#there[storage] = this.#there[storage].filter(({ id }) => !ids.includes(id))
    const next = this.#next[storage]
    if (next && 'parent' in next && !ids.includes(next.parent)) return
    this.#next[storage] = next && this.#noParent(storage)
  }

  async #prune(storage: StorageName): Promise<void> {
    const manager = new ChainManager({ storage: this.#ground.storage(storage) })
    const keepLast = 1 + this.#random.below(4)
    const there = this.#there[storage].map(({ id }) => id)
    const kept = this.#withAncestors(storage, there.slice(-keepLast))
    const wanted = there.filter(id => !kept.includes(id))
    const { removed } = await manager.prune({ instance: INSTANCE, keepLast })
    const found = removed.map(({ manifest }) => manifest.id).sort()
    if (found.join() !== wanted.join())
      throw new Error(`the last ${keepLast} are kept, and ${found} went, not ${wanted}`)
    this.#remove(storage, wanted)
    await this.#compareList(storage)
  }

  async #resize(name: 'grow' | 'shrink' | 'shrink and grow'): Promise<void> {
    const disk = this.#random.pick(DISKS)
    const bytes = (1 + this.#random.below(2000)) * 512
    const now = this.#ground.content[disk]?.byteLength ?? 0
    const larger = now + (name === 'grow' || this.#random.oneIn(2) ? bytes : 0)
    // At the end of a cluster: of one that it cuts, QEMU shows all again when the disk grows.
    const smaller = Math.floor((now - bytes) / CLUSTER) * CLUSTER
    const sizes = { grow: [larger], shrink: [smaller], 'shrink and grow': [smaller, larger] }[name]
    if (smaller < LEAST_BYTES || larger > MOST_BYTES) return
    for (const size of sizes) await this.#ground.resize(disk, size)
    if (name === 'shrink and grow') for (const cut of Object.values(this.#cut)) cut.add(disk)
    // The disk has a full image for it where it is smaller than at the parent, which is not always the backup before.
    if (name === 'shrink') this.#next.first = this.#next.second = undefined
  }
}
