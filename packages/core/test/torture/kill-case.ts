import { readdir, readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { execa } from 'execa'
import { ChainManager } from '../../src/chain-manager.ts'
import { isVarveError } from '../../src/errors.ts'
import type { BackupManifest, FallbackReason } from '../../src/manifest.ts'
import { type RecoveredRun, recover } from '../../src/recover.ts'
import { RestorePipeline } from '../../src/restore-pipeline.ts'
import { expectContent } from './expect-content.ts'
import { expectNoOtherObjects, pruneLater } from './expect-objects.ts'
import { expectCleanState, expectNoTemporaryState } from './expect-state.ts'
import { CHANGES_WHILE_MERGED, DISKS, INSTANCE } from './guest.ts'
import type { Job, Task } from './job.ts'
import type { Kill } from './kill-points.ts'
import { serversWith } from './processes.ts'
import type { Content, ProvingGround, StorageName } from './proving-ground.ts'
import { Random } from './random.ts'
import { aroundSteps, damage, isToFail, type Prepared, type Scenario } from './scenarios.ts'
import type { End, Meanwhile, Victims } from './victims.ts'

/** Where things happen, and how. */
export interface KillCase {
  readonly scenario: Scenario
  /** The point at which the run dies, see {@link Kill}; or after so many milliseconds. None: it does not. */
  readonly kill?: Pick<Kill, 'at' | 'label'> | { readonly afterMs: number }
  readonly scope?: 'process' | 'group'
  /** What happens to the instance before the run is settled. Default: nothing. */
  readonly mishap?: 'switched off' | 'QEMU killed'
  /** The point at which the first try to settle the run dies too: its number, or the first one of a label. */
  readonly recoverKill?: number | string
  /** Whether the chain on the other storage is looked at too. */
  readonly second?: boolean
  /** Of what the guest writes. */
  readonly seed: number
}

/** What a case came to. */
export interface CaseResult {
  readonly end: End
  readonly settled: readonly RecoveredRun[]
  /** Whether the first try to settle the run died, where it was to. */
  readonly recoverKilled: boolean
}

/** The points that a run reaches when nobody kills it. Rejects where it does not record the steps that its scenario names. */
export async function findPoints(
  ground: ProvingGround,
  victims: Victims,
  prepared: Prepared,
  scenario: Scenario,
): Promise<readonly string[]> {
  await ground.load(scenario.from)
  if (scenario.instance === 'running') await ground.start()
  const task = scenario.task(prepared, ground)
  const end = await runVictim(ground, victims, { scenario, seed: 0 }, task, new Random(0))
  if (end.killed) throw new Error(`${scenario.name} was killed`)
  if ((end.failure !== undefined) !== isToFail(scenario))
    throw new Error(`${scenario.name} ended with ${end.failure?.message ?? 'success'}`)
  const missing = aroundSteps(scenario).filter(point => !end.points.includes(point))
  if (missing.length > 0) throw new Error(`${scenario.name} does not reach: ${missing.join(', ')}`)
  return end.points
}

/** Runs a case and rejects where the promise was broken: see docs/reliability.md. */
export async function runKillCase(
  ground: ProvingGround,
  victims: Victims,
  prepared: Prepared,
  killCase: KillCase,
): Promise<CaseResult> {
  const { scenario, mishap, seed } = killCase
  const random = new Random(seed)
  await ground.load(scenario.from)
  if (scenario.instance === 'running') await ground.start()
  const task = scenario.task(prepared, ground)
  const before = ground.content
  const known = await backupIds(ground)
  const others = await backupIds(ground, 'second')

  const end = await runVictim(ground, victims, killCase, task, random)
  // What the guest writes from here on is in the overlay, where there is one, which may be being merged.
  if ((await ground.state()) === 'running' && task.kind === 'backup')
    await ground.write(random, CHANGES_WHILE_MERGED)
  if (mishap === 'switched off') await ground.stop()
  if (mishap === 'QEMU killed' && (await ground.state()) === 'running') await ground.killQemu()
  const recoverKilled = await recoverDies(ground, victims, killCase)
  const settled = await settle(ground, task)

  if (scenario.from === 'damaged') await damage(ground, prepared.middle)

  if (!end.killed && end.failure && !isToFail(scenario)) throw new Error(end.failure.message)
  const isRemoval = task.kind === 'delete' || task.kind === 'prune'
  const kept = isRemoval ? await expectRemoved(ground, task, known) : known
  const ids = await backupIds(ground)
  expectSame(
    'the backups of before',
    ids.filter(id => known.includes(id)),
    kept,
  )
  expectSame('the backups on the other storage', await backupIds(ground, 'second'), others)
  const published = ids.filter(id => !known.includes(id))
  if (published.length > (task.kind === 'backup' ? 1 : 0)) throw new Error(`${published} were published`)
  if (!end.killed && end.backup !== undefined) expectSame('what was published', published, [end.backup])
  if (task.kind === 'backup') {
    for (const id of published) ground.remember(id, task.request.disks, before)
    if (settled.length > 0) {
      const outcome = published.length > 0 ? 'finished' : 'undone'
      expectSame(
        'the outcome of the backup',
        settled.map(run => run.outcome),
        [outcome],
      )
    }
    if (mishap === undefined && scenario.instance !== 'images')
      expectSame('the state of the instance', await ground.state(), scenario.instance)
  }
  if (task.kind === 'restore') await expectRestored(ground, killCase, task, { before, settled, end })
  await expectClean(ground, scenario)
  await expectGoesOn(ground, killCase, { task, random, published })
  return { end, settled, recoverKilled }
}

async function runVictim(
  ground: ProvingGround,
  victims: Victims,
  { scenario, kill, scope = 'process' }: KillCase,
  task: Task,
  random: Random,
): Promise<End> {
  const job: Job = {
    task,
    host: ground.host.reference,
    storage: ground.storagePath('first'),
    stateDir: ground.stateDir,
    frozenFlag: ground.frozenFlag,
    ...(kill && {
      kill: { ...('at' in kill ? kill : { at: -1 }), scope, diary: join(ground.folder, 'diary') },
    }),
  }
  const meanwhile: Meanwhile = {
    ...(scenario.instance === 'running' && { streaming: () => ground.write(random) }),
    ...(kill && 'afterMs' in kill && { killAfterMs: kill.afterMs }),
  }
  return victims.run(job, meanwhile)
}

/** Returns whether recover() died: it may reach its end before that point. */
async function recoverDies(
  ground: ProvingGround,
  victims: Victims,
  { recoverKill, scope = 'process' }: KillCase,
): Promise<boolean> {
  if (recoverKill === undefined) return false
  const end = await victims.run({
    task: { kind: 'recover' },
    host: ground.host.reference,
    storage: ground.storagePath('first'),
    stateDir: ground.stateDir,
    frozenFlag: ground.frozenFlag,
    kill: {
      ...(typeof recoverKill === 'number' ? { at: recoverKill } : { at: 1, label: recoverKill }),
      ...{ scope, diary: join(ground.folder, 'diary') },
    },
  })
  if (!end.killed && end.failure) throw new Error(`recover that was to die failed: ${end.failure.message}`)
  return end.killed
}

async function settle(ground: ProvingGround, task: Task): Promise<RecoveredRun[]> {
  const { stateDir, host } = ground
  const { runs, ok } = await recover({ stateDir, host, storages: [ground.storage('first')] })
  const incomplete = task.kind === 'restore' && task.request.inPlace === true
  for (const { outcome, error } of runs) {
    if (outcome === 'unresolved' || outcome === 'running' || (outcome === 'incomplete' && !incomplete))
      throw new Error(`the run is ${outcome}`, { cause: error })
  }
  expectSame('whether all is settled', ok || incomplete, true)
  return [...runs]
}

/**
 * The disks hold either all of the old or all of the new, and the instance runs as it did; where they hold neither, it is
 * off, and a second restore does it.
 */
async function expectRestored(
  ground: ProvingGround,
  { scenario, mishap }: KillCase,
  task: Task & { kind: 'restore' },
  { before, settled, end }: { before: Content; settled: readonly RecoveredRun[]; end: End },
): Promise<void> {
  const restored = ground.backups.get(task.request.backup) ?? {}
  const state = await ground.state()
  await ground.stop()
  const content = await ground.stored()
  const found = [before, restored].find(one => DISKS.every(disk => sameBytes(one[disk], content[disk])))
  const outcome = settled[0]?.outcome
  if (outcome === 'incomplete') {
    const { stateDir, host } = ground
    expectSame('the state of an instance with half a disk', state, 'off')
    const refusal = await ground.backup('first').catch((error: unknown) => error)
    if (!isVarveError(refusal, 'DISK_INCOMPLETE'))
      throw new Error('half a disk is backed up', { cause: refusal })
    expectSame(
      'the outcome of a restore that is not done again',
      (await settle(ground, task)).map(run => run.outcome),
      ['incomplete'],
    )
    await new RestorePipeline({ host, stateDir, storage: ground.storage('first') }).run(task.request)
    await ground.stop()
    ground.content = restored
    expectContent('the disks after a second restore', await ground.stored(), restored)
    return
  }
  const failed = !end.killed && end.failure !== undefined
  const isNew = outcome === undefined ? (failed ? false : undefined) : outcome === 'finished'
  // Undefined: it was killed before its journal began, or after that was gone.
  const wanted = isNew === undefined ? found : isNew ? restored : before
  if (!wanted) throw new Error('the disks hold neither the old nor the restored content')
  expectContent('the disks after the restore', content, wanted)
  ground.content = wanted
  if (mishap === undefined) {
    if (scenario.instance === 'running') expectSame('the state of the instance', state, 'running')
    if (scenario.instance === 'off' && isNew !== undefined)
      expectSame('the state of the instance', state, isNew && task.request.start ? 'running' : 'off')
  }
  if (state === 'running') await ground.start()
}

/**
 * A removal that was cut short has removed nothing that was to be kept, and what it left is whole. It is done again: then
 * exactly what was to go is gone. What the first try left besides is garbage a day later.
 *
 * @returns what was to be kept
 */
async function expectRemoved(
  ground: ProvingGround,
  task: Task & { kind: 'delete' | 'prune' },
  known: readonly string[],
): Promise<string[]> {
  const manager = new ChainManager({ storage: ground.storage('first') })
  // The policy keeps the newest one, which is a full backup.
  const kept = task.kind === 'delete' ? known.filter(id => id !== task.backup) : known.slice(-1)
  if (kept.length === 0 || kept.length === known.length)
    throw new Error('nothing to keep, or nothing to remove')
  const there = await backupIds(ground)
  expectSame(
    'what was to be kept',
    there.filter(id => kept.includes(id)),
    kept,
  )
  for (const id of there) expectSame(`the problems of ${id}`, (await manager.verify(id)).problems, [])
  if (task.kind === 'prune') await manager.prune(task.policy)
  else {
    await manager.delete(task.backup).catch(error => {
      if (!isVarveError(error, 'BACKUP_NOT_FOUND')) throw error
    })
  }
  await pruneLater(ground.storage('first'))
  return kept
}

/** Nothing is left of the run but the backup. */
async function expectClean(ground: ProvingGround, scenario: Scenario): Promise<void> {
  expectSame('the files of the instance', await ground.files(), ['vda.qcow2', 'vdb.qcow2'])
  expectSame('the temporary files', await readdir(ground.temporary), [])
  await expectCleanState(ground.stateDir)
  await ground.expectBackingUntouched()
  expectSame('the servers', serversWith(ground.folder), [])
  const agent = await readFile(ground.frozenFlag, 'utf8').catch(() => 'thawed')
  expectSame('the guest agent', agent, 'thawed')
  const { disks } = await ground.host.instance(INSTANCE)
  const ids = await backupIds(ground)
  for (const disk of disks) {
    const { name, path } = disk
    const bitmaps = 'bitmaps' in disk ? disk.bitmaps : []
    expectSame(`the source of ${name}`, path, ground.image(name === 'vda' ? 'vda' : 'vdb'))
    const names = bitmaps.map(bitmap => bitmap.name.replace('varve-', ''))
    const others = await backupIds(ground, 'second')
    const stray = names.filter(id => !ids.includes(id) && !others.includes(id))
    // The bitmap of a backup that is deleted stays; see docs/architecture.md.
    if (!scenario.name.startsWith('deletion')) expectSame(`the stray bitmaps of ${name}`, stray, [])
    const own = names.filter(id => ids.includes(id))
    if (own.length > 1) throw new Error(`${name} has bitmaps of ${own.length} backups: ${own}`)
  }
  await expectNoOtherObjects(ground.storage('first'), ground.storagePath('first'))
}

/** Why a disk may have a full image after all. */
function excuseOf({ scenario, mishap, scope }: KillCase, task: Task): FallbackReason | undefined {
  if (task.kind === 'delete') return 'bitmap-missing'
  // The QEMU of a domain is none of what a backup has started, and goes on; the `qemu-img` that has an image open is.
  const isUntouched = task.kind === 'backup' && scenario.instance === 'running' && mishap === undefined
  const isKilled = mishap === 'QEMU killed' || (scope === 'group' && !isUntouched)
  return isKilled ? 'bitmap-inconsistent' : undefined
}

/**
 * Whether a restore in place died between the bitmaps of two disks: they have those of different backups then, and the next
 * backup can rest on one of these only.
 */
async function diedBetweenMarks(ground: ProvingGround, task: Task): Promise<boolean> {
  if (task.kind !== 'restore' || !task.request.inPlace) return false
  const { disks } = await ground.host.instance(INSTANCE)
  const marks = disks.map(disk => ('bitmaps' in disk ? disk.bitmaps.map(({ name }) => name).sort() : []))
  return new Set(marks.map(names => names.join())).size > 1
}

/** Every disk has an increment, or a full image for a reason that there may be. */
function expectIncrements({ disks }: BackupManifest, excuses: readonly (FallbackReason | undefined)[]): void {
  for (const { name, kind, fallback } of disks) {
    if (kind === 'full' && fallback !== undefined && excuses.includes(fallback)) continue
    expectSame(`the kind of ${name}`, [kind, fallback], ['incremental', undefined])
  }
}

/** The instance runs or starts, every backup restores to what it held, and so does the next one. */
async function expectGoesOn(
  ground: ProvingGround,
  killCase: KillCase,
  { task, random, published }: { task: Task; random: Random; published: readonly string[] },
): Promise<void> {
  const { scenario, second } = killCase
  const looksAtAll = task.kind === 'delete' || task.kind === 'prune'
  const excuse = excuseOf(killCase, task)
  const isBetween = await diedBetweenMarks(ground, task)
  const excuses: (FallbackReason | undefined)[] = [excuse, isBetween ? 'bitmap-missing' : undefined]
  if (scenario.instance !== 'images') await ground.start()
  await ground.write(random)
  const there = await backupIds(ground)
  const next = await ground.backup('first')
  await expectNoTemporaryState(ground.stateDir)
  const isOfOneDisk = task.kind === 'backup' && task.request.disks !== undefined && published.length > 0
  if (there.length === 0) {
    const found = next.disks.map(({ name, kind, fallback }) => `${name} ${kind} ${fallback}`)
    expectSame('the first backup', found, ['vda full no-parent', 'vdb full no-parent'])
  } else if (isOfOneDisk) {
    const [vda, vdb] = next.disks
    expectSame('the disk that had no part', [vda?.kind, vda?.fallback], ['full', 'disk-new'])
    expectIncrements({ ...next, disks: vdb ? [vdb] : [] }, excuses)
  } else {
    expectIncrements(next, excuses)
  }
  if (second) {
    await ground.write(random)
    const other = await ground.backup('second')
    // A restored image has the bitmap of its own chain alone.
    const isRestored = task.kind === 'restore'
    if (!isRestored && scenario.from !== 'empty') expectIncrements(other, excuses)
    expectContent(
      'the next backup on the second storage',
      await ground.restored('second', other),
      ground.content,
    )
  }
  const { backups } = await new ChainManager({ storage: ground.storage('first') }).list()
  expectSame(
    'the backups in the end',
    backups.map(({ manifest }) => manifest.id),
    [...there, next.id],
  )
  const older = backups.filter(({ manifest }) => manifest.id !== next.id && !published.includes(manifest.id))
  const another = older.length > 0 ? random.pick(older).manifest.id : undefined
  for (const { manifest } of backups) {
    const isOlder = older.some(one => one.manifest.id === manifest.id)
    if (isOlder && manifest.id !== another && !looksAtAll) continue
    const wanted = ground.backups.get(manifest.id)
    if (!wanted) throw new Error(`nobody took the backup ${manifest.id}`)
    expectContent(`the backup ${manifest.id}`, await ground.restored('first', manifest), wanted)
  }
  await ground.stop()
  expectContent('the disks in the end', await ground.stored(), ground.content)
  for (const disk of DISKS) {
    const { exitCode, stderr } = await execa('qemu-img', ['check', '-f', 'qcow2', ground.image(disk)], {
      reject: false,
    })
    // A writer that is killed leaves clusters that nobody uses.
    if (exitCode !== 0 && !(exitCode === 3 && excuse === 'bitmap-inconsistent'))
      throw new Error(`qemu-img check: ${stderr}`)
  }
}

async function backupIds(ground: ProvingGround, name: StorageName = 'first'): Promise<string[]> {
  const { backups, damaged } = await new ChainManager({ storage: ground.storage(name) }).list()
  expectSame('the damaged manifests', damaged, [])
  return backups.map(({ manifest }) => manifest.id)
}

function sameBytes(one: Buffer | undefined, other: Buffer | undefined): boolean {
  return one !== undefined && other !== undefined && one.equals(other)
}

function expectSame(what: string, found: unknown, wanted: unknown): void {
  const [is, should] = [JSON.stringify(found), JSON.stringify(wanted)]
  if (is !== should) throw new Error(`${what}: ${is} and not ${should}`)
}
