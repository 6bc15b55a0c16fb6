import { readdir, readFile, rm } from 'node:fs/promises'
import { join } from 'node:path'
import { ChainManager, isVarveError, RestorePipeline, recover } from '@varve/core'
import { expectContent } from '../../../core/test/torture/expect-content.ts'
import { expectNoOtherObjects, pruneLater } from '../../../core/test/torture/expect-objects.ts'
import { expectCleanState, expectNoTemporaryState } from '../../../core/test/torture/expect-state.ts'
import { DISKS } from '../../../core/test/torture/guest.ts'
import type { Job, Task } from '../../../core/test/torture/job.ts'
import { serversWith } from '../../../core/test/torture/processes.ts'
import { Random } from '../../../core/test/torture/random.ts'
import { Victims } from '../../../core/test/torture/victims.ts'
import { CephConnector } from '../../src/index.ts'
import { type Content, copied, type InstanceKind, KillGround } from './kill-ground.ts'
import { KillLab } from './kill-lab.ts'
import { type KillRun, type RunName, taskOf } from './kill-runs.ts'

/** Where a run dies: before or after one of its steps, such as `after rbd-snapshot`; and how. */
export interface KillCase {
  readonly kind: InstanceKind
  readonly run: RunName
  readonly point: string
  /** Of several such points, which one. */
  readonly nth: number
  /** Where it dies at a moment and not at a point, which then has a name only: after so many milliseconds. */
  readonly afterMs?: number
  readonly scope: 'process' | 'group'
  /** The point at which the first try to settle the run dies too, counted from 1. Default: it does not. */
  readonly recoverAt?: number
}

/** Backups in a chain after which another one is begun: fewer than its limit. */
const LONG_CHAIN = 20

/**
 * Kills runs on instances with RBD images, one case after the other: each goes on with what the one before has left,
 * which must be as if it had never been.
 */
export class KillCases implements AsyncDisposable {
  readonly #lab: KillLab
  readonly #victims: Victims
  readonly #random: Random
  readonly #grounds = new Map<InstanceKind, KillGround>()

  private constructor(lab: KillLab, victims: Victims, random: Random) {
    this.#lab = lab
    this.#victims = victims
    this.#random = random
  }

  static async prepare(seed: number): Promise<KillCases> {
    const lab = await KillLab.start()
    return new KillCases(lab, await Victims.prepare(lab.temporary), new Random(seed))
  }

  /** The points that a run reaches which nobody kills. Rejects where it does not record the steps that it names. */
  async points({ kind, name, steps }: KillRun): Promise<readonly string[]> {
    const ground = await this.#ground(kind)
    const { end } = await this.#attempt(ground, name, undefined)
    if (end.killed || end.failure) throw new Error(`${name} (${kind}) ended with ${JSON.stringify(end)}`)
    const recorded = end.points.filter(point => /^after (?!settled)/.test(point))
    const wanted = steps.map(step => `after ${step}`)
    expectSame(`the steps of ${name} (${kind})`, [...new Set(recorded)].sort(), wanted.sort())
    return end.points
  }

  /** Runs a case and rejects where something is left of it, or wrong. Tells whether it died, and who settled it. */
  async run(one: KillCase): Promise<{ killed: boolean; recoverKilled: boolean }> {
    const { end, recoverKilled } = await this.#attempt(await this.#ground(one.kind), one.run, one)
    return { killed: end.killed, recoverKilled }
  }

  async #ground(kind: InstanceKind): Promise<KillGround> {
    const there = this.#grounds.get(kind)
    if (there) return there
    const ground = await KillGround.create(this.#lab, kind, this.#random)
    this.#grounds.set(kind, ground)
    return ground
  }

  async #attempt(ground: KillGround, run: RunName, kill: KillCase | undefined) {
    await ground.write()
    // Of a prune, so that what was before goes.
    if (run === 'prune' || (await isChainLong(ground))) await ground.backup('full')
    if (run === 'deletion') await ground.backup() // there is one that it rests on
    const [before, known] = [copied(ground.content), await backupIds(ground)]
    const newest = known.at(-1) ?? ''
    const backup = run === 'deletion' ? newest : this.#random.pick(known)
    const task = taskOf(run, backup, ground)
    const job = {
      host: ground.host.reference,
      storage: ground.storagePlace,
      stateDir: ground.stateDir,
      frozenFlag: ground.frozenFlag,
      ceph: this.#lab.ceph,
    }
    const at = kill && this.#deathOf(kill)
    const runs = ground.wantedState === 'running' // a guest writes while it is backed up
    const end = await this.#victims.run(
      { ...job, task, ...(at && { kill: at }) },
      {
        streaming: async () => void (runs && (await ground.write())),
        ...(kill?.afterMs !== undefined && { killAfterMs: kill.afterMs }),
      },
    )
    const recoverKilled =
      kill?.recoverAt !== undefined &&
      (await this.#recoverDies({
        ...job,
        task: { kind: 'recover' },
        kill: this.#killAt(kill.recoverAt, kill),
      }))
    const outcome = await this.#settle(ground)

    const isRemoval = task.kind === 'delete' || task.kind === 'prune'
    const kept = task.kind === 'delete' ? known.slice(0, -1) : task.kind === 'prune' ? [newest] : known
    if (isRemoval) await removeAgain(ground, task, kept)
    const ids = await backupIds(ground)
    expectSame(
      'the backups of before',
      ids.filter(id => known.includes(id)),
      kept,
    )
    const published = ids.filter(id => !known.includes(id))
    const restored = ground.backups.get(backup) ?? before
    if (task.kind === 'restore' && task.request.inPlace && outcome === 'incomplete') {
      if (runs) expectSame('the state of a domain with half a disk', await ground.state(), 'shut off')
      const { host, stateDir, storage } = ground
      await new RestorePipeline({ host, storage, stateDir }).run(task.request)
      await ground.start() // which a restore does not where it was off
    } else if (outcome === 'incomplete') throw new Error(`${run} is incomplete`)
    const stored = await ground.stored()
    if (task.kind === 'backup') {
      for (const id of published) ground.backups.set(id, before)
      // Where recover() was killed too, the second one may have found nothing any more.
      if (outcome && (outcome === 'finished') !== (published.length === 1))
        throw new Error(`a backup is ${outcome} and ${published.length} were published`)
      expectContent('the disks', stored, ground.content)
    } else if (isRemoval) {
      expectSame('what was published', published, [])
      expectContent('the disks', stored, ground.content)
    } else if (run === 'restore to copies') {
      expectContent('the disks', stored, before)
      await this.#lookAtCopies(ground, restored, outcome)
    } else {
      const isNew =
        outcome === undefined
          ? DISKS.every(disk => stored[disk].equals(restored[disk]))
          : outcome !== 'undone'
      expectContent(`the disks after a restore that is ${outcome}`, stored, isNew ? restored : before)
      ground.content = copied(isNew ? restored : before)
    }
    await this.#expectClean(ground)
    if (!isRemoval) await expectNoStrayMarks(ground)
    await this.#expectGoesOn(ground, published)
    await expectNoStrayMarks(ground) // the snapshot of a backup that was deleted goes with the next one at the latest
    return { end, recoverKilled }
  }

  /** Returns whether it died: it may reach its end before that point. */
  async #recoverDies(job: Job): Promise<boolean> {
    const end = await this.#victims.run(job)
    if (!end.killed && end.failure) throw new Error(`recover that was to die failed: ${end.failure.message}`)
    return end.killed
  }

  /** At a moment it is killed from outside, and at no point. */
  #deathOf(kill: KillCase): NonNullable<Job['kill']> {
    return kill.afterMs === undefined ? this.#killAt(kill.nth + 1, kill, kill.point) : this.#killAt(-1, kill)
  }

  #killAt(at: number, { scope }: KillCase, label?: string): NonNullable<Job['kill']> {
    return { at, scope, diary: join(this.#lab.folder, 'diary'), ...(label !== undefined && { label }) }
  }

  /** What came of the run that was cut short; undefined where none was. */
  async #settle({ host, stateDir, storage }: KillGround): Promise<string | undefined> {
    const rbd = new CephConnector(this.#lab.ceph)
    const { runs } = await recover({ stateDir, host, storages: [storage], rbd })
    const [outcome, ...others] = runs.map(({ outcome, error }) => {
      if (error) throw error
      if (outcome === 'running') throw new Error('a run that was killed is said to go on')
      return outcome
    })
    if (others.length > 0) throw new Error(`${runs.length} runs were cut short`)
    return outcome
  }

  async #lookAtCopies(ground: KillGround, restored: Content, outcome: string | undefined): Promise<void> {
    const there = [...(await this.#lab.images()), ...(await ground.files())]
    const copies = DISKS.filter(disk => {
      const path = ground.copyPath(disk)
      return there.includes(path.slice(path.lastIndexOf('/') + 1))
    })
    if (outcome === 'finished' && copies.length < 2) throw new Error(`only ${copies} of the copies`)
    if (outcome === 'undone' && copies.length > 0) throw new Error(`${copies} were left`)
    for (const disk of copies) {
      const path = ground.copyPath(disk)
      expectContent('the copies', { [disk]: await ground.bytes(path) }, { [disk]: restored[disk] })
      if (path.startsWith('rbd:')) await this.#lab.site.cluster.removeImage(path.slice(4))
      else await rm(path)
    }
  }

  /** Nothing is left but the disks, and the bitmaps and snapshots of backups that are there. */
  async #expectClean(ground: KillGround): Promise<void> {
    const images = [...this.#grounds.values()].flatMap(({ images }) => images)
    const files = DISKS.map(disk => ground.path(disk)).filter(path => !path.startsWith('rbd:'))
    expectSame('the images', await this.#lab.images(), images.sort())
    expectSame('the files', (await ground.files()).length, files.length)
    await expectCleanState(ground.stateDir)
    expectSame('the temporary files', await readdir(this.#lab.temporary), [])
    expectSame('the servers', serversWith(this.#lab.folder, ...images.map(image => `/${image}`)), [])
    const agent = await readFile(ground.frozenFlag, 'utf8').catch(() => 'thawed')
    expectSame('the guest agent', agent, 'thawed')
    expectSame('the state of the domain', await ground.state(), ground.wantedState)
    const { storage, storagePlace } = ground
    await expectNoOtherObjects(storage, typeof storagePlace === 'string' ? storagePlace : undefined)
  }

  /** The next backup is an increment, and it, what the victim published and one of before hold what they must. */
  async #expectGoesOn(ground: KillGround, published: readonly string[]): Promise<void> {
    const older = (await backupIds(ground)).filter(id => !published.includes(id))
    await ground.write()
    const next = await ground.backup()
    await expectNoTemporaryState(ground.stateDir)
    const kinds = next.disks.map(({ name, kind, fallback }) => [name, kind, fallback])
    expectSame(
      'the kinds',
      kinds,
      DISKS.map(disk => [disk, 'incremental', undefined]),
    )
    const looks = [...published, next.id, this.#random.pick(older)].map(async id => {
      const wanted = ground.backups.get(id)
      if (!wanted) throw new Error(`nobody took the backup ${id}`)
      expectContent(`the backup ${id}`, await ground.restored(id), wanted)
    })
    await Promise.all(looks)
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#victims[Symbol.asyncDispose]()
    for (const ground of this.#grounds.values()) await ground[Symbol.asyncDispose]()
    await this.#lab[Symbol.asyncDispose]()
  }
}

/**
 * A removal that was cut short has removed nothing that was to be kept. It is done again: then all that was to go is gone,
 * and what the first try left besides is garbage a day later.
 */
async function removeAgain(
  { host, storage, stateDir }: KillGround,
  task: Task & { kind: 'delete' | 'prune' },
  kept: readonly string[],
): Promise<void> {
  const manager = new ChainManager({ host, storage, stateDir })
  for (const id of kept) expectSame(`the problems of ${id}`, (await manager.verify(id)).problems, [])
  if (task.kind === 'prune') await manager.prune(task.policy)
  else {
    await manager.delete(task.backup).catch(error => {
      if (!isVarveError(error, 'BACKUP_NOT_FOUND')) throw error
    })
  }
  await pruneLater(storage)
}

/** Whether increments would soon reach the limit of a chain, and what comes after a kill be full for that. */
async function isChainLong({ storage }: KillGround): Promise<boolean> {
  const { backups } = await new ChainManager({ storage }).list()
  const chain = backups.at(-1)?.manifest.chain
  return backups.filter(({ manifest }) => manifest.chain === chain).length > LONG_CHAIN
}

async function expectNoStrayMarks(ground: KillGround): Promise<void> {
  const ids = await backupIds(ground)
  const stray = (await ground.marked()).filter(id => !ids.includes(id))
  expectSame('the stray bitmaps and snapshots', stray, [])
}

async function backupIds({ storage }: KillGround): Promise<string[]> {
  const { backups, damaged } = await new ChainManager({ storage }).list()
  expectSame('the damaged manifests', damaged, [])
  return backups.map(({ manifest }) => manifest.id)
}

function expectSame(what: string, found: unknown, wanted: unknown): void {
  const [is, should] = [JSON.stringify(found), JSON.stringify(wanted)]
  if (is !== should) throw new Error(`${what}: ${is} and not ${should}`)
}
