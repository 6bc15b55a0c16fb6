import { rm } from 'node:fs/promises'
import { setTimeout as sleep } from 'node:timers/promises'
import { fileIdentity } from './bitmap-twin.ts'
import { readDomainXml } from './domain-xml.ts'
import { errorMessage, isVarveError, VarveError } from './errors.ts'
import { changeSince } from './file-state.ts'
import type { Host, InstanceDisks } from './host.ts'
import { assertUnused } from './image-lock.ts'
import { forgetIncomplete, incompleteDisks, presenceOfOverwritten } from './incomplete.ts'
import { unmark } from './incomplete-mark.ts'
import type {
  ImageRename,
  JournalStepOf,
  OverwrittenDisk,
  Rename,
  RunJournal,
  TargetImage,
} from './journal.ts'
import { presenceOf } from './presence.ts'
import { assertNameIsFree, putInPlace } from './put-in-place.ts'
import { stopExports } from './qemu-nbd.ts'
import { RBD_PREFIX, type RbdCluster, rbdImageOf } from './rbd.ts'
import { isClusterTold, isImageGone } from './rbd-disk.ts'
import {
  assertReplaceable,
  type Replacement,
  removeReplaced,
  replaceImage,
  stillInUse,
  usedSince,
} from './replace-image.ts'
import { assertImageUnused } from './restore-plan-rbd.ts'
import { emit, type RunOptions } from './run-options.ts'
import { worstOf } from './settle-backup.ts'
import { statIfThere } from './stat-if-there.ts'

/**
 * How long an RBD image may take to come that a process asked for before it died, in milliseconds: the `rbd` that makes it
 * goes on by itself, and a cluster may be slow.
 */
const IMAGE_ARRIVAL_MS = 10_000
/** How often such an image is looked for, in milliseconds. */
const ARRIVAL_INTERVAL_MS = 250

/** What a restore came to. */
export interface SettledRestore {
  /** Whether the new disks took the place of the old ones. */
  readonly finished: boolean
  readonly started: boolean
  /** The disks that were being written over and are incomplete. */
  readonly incomplete: readonly string[]
  /** Why libvirt did not take the definition, where that is why everything is as it was. */
  readonly refusal?: VarveError
  /** Why the instance, which was to be started, was not; all else is settled. */
  readonly notStarted?: VarveError
}

/**
 * Ends a restore: after success, failure or, by `recover`, the death of its process. Once every new file is
 * complete, which the step `finish` tells, it is carried through; before, or where libvirt refuses the
 * definition, the new files are removed. The instance is started if it is to run, unless a disk of it is
 * incomplete: such disks stay on record until they have been restored, or are gone. That a file is not there does not
 * tell that: its file system may not be mounted. May be cut short and called again.
 *
 * @param died whether the restore's process died, so that what it had begun may be under way. Default: false
 * @throws RUN_UNRESOLVED when the instance runs again, or has run, on disks that were to be replaced, or where a new file is
 *   not found, and it cannot be told whether it is gone
 */
export async function settleRestore(
  journal: RunJournal,
  host: Host,
  run: Omit<RunOptions, 'signal'>,
  { died = false }: { readonly died?: boolean } = {},
): Promise<SettledRestore> {
  const known = incompleteDisks(journal)
  if (known) return settleIncomplete(journal, known, host, run)
  const names = journal.header.disks.map(({ name }) => name)
  for (const { folder } of journal.of('export')) await stopExports(folder, names)

  const undone = journal.of('undo').length > 0
  const finish = undone ? undefined : journal.of('finish').at(-1)
  const refusal = finish && (await finishSwap(journal, finish, host, run))

  // In place the disks alone are all of it, unless their definition was still to come.
  const decided = finish !== undefined || undone || journal.of('define').length === 0
  const overwritten = journal.of('written-in-place').length > 0 && decided
  const finished = refusal === undefined && !undone && (finish !== undefined || overwritten)
  const writing = overwritten ? [] : journal.of('write-in-place')
  const power = journal.of('power-off').at(-1)
  const wanted = finished ? power?.start : power?.wasRunning
  const start = wanted === true && writing.length === 0
  const failures: unknown[] = []
  const attempt = (work: Promise<void>) => work.catch(error => void failures.push(error))
  for (const step of journal.of('mark-incomplete')) {
    if (!writing.some(({ disk }) => disk === step.disk))
      await attempt(unmark(journal, step, { host, isComplete: overwritten }, run))
  }
  let notStarted: VarveError | undefined
  if (power && start) {
    const known = failures.length
    await attempt(assertStartable(journal, power, host, run))
    if (failures.length === known)
      await startAgain(power, host, run).catch(error => {
        notStarted = startError(error, power.instance)
      })
  }
  const taken = (!refusal && finish?.renames.map(({ temporary }) => temporary)) || []
  for (const made of journal.of('target-create'))
    if (!taken.includes(made.temporary)) await attempt(removeTemporary(journal, made))
  // After the start: a large image takes its time.
  const renamed = (!refusal && finish?.images) || []
  const mayCome = died && journal.steps.at(-1)?.step === 'image-create'
  const arrivesBy = performance.now() + (mayCome ? IMAGE_ARRIVAL_MS : 0)
  for (const made of journal.of('image-create')) {
    if (!renamed.some(({ image }) => image === made.image))
      await attempt(removeUnfinished(journal, host, made, arrivesBy, run))
  }
  for (const step of renamed) await removeReplaced(() => host.rbd(step.of, run), step, journal.header.id, run)
  if (failures.length > 0)
    throw worstOf([...failures, notStarted, refusal].filter(error => error !== undefined))
  if (finished || overwritten) await forgetIncomplete(journal)
  await journal.settledBut(writing) // an instance that does not start is no reason to hold its disks
  return {
    finished,
    started: start && !notStarted,
    incomplete: writing.map(({ disk }) => disk),
    ...(refusal && { refusal }),
    ...(notStarted && { notStarted }),
  }
}

/** All else was settled before. */
async function settleIncomplete(
  journal: RunJournal,
  known: readonly OverwrittenDisk[],
  host: Host,
  run: RunOptions,
): Promise<SettledRestore> {
  const left: OverwrittenDisk[] = []
  for (const disk of known) {
    const presence = await presenceOfOverwritten(disk, host, run)
    if (presence === 'unknown') emit(run, { type: 'warning', message: notThere(journal, disk) })
    if (presence !== 'gone') left.push(disk)
  }
  if (left.length < known.length) await journal.settledBut(left)
  return { finished: false, started: false, incomplete: left.map(({ disk }) => disk) }
}

function notThere({ header }: RunJournal, { disk, path, of }: OverwrittenDisk): string {
  const cause = of
    ? `the domain ${of.instance}, which tells its Ceph cluster, is not defined`
    : 'its file system may not be mounted yet, or its device not be there yet'
  return `The disk ${disk} (${path}), which the restore ${header.id} left incomplete, is not found: ${cause}. It stays on record. If the disk is gone for good, remove runs/${header.id}.jsonl in the state folder.`
}

/** @throws RUN_UNRESOLVED where it cannot be told whether it is there */
async function removeTemporary(
  { header }: RunJournal,
  { temporary, folder }: JournalStepOf<'target-create'>,
): Promise<void> {
  if ((await presenceOf(temporary, folder)) === 'unknown') {
    throw new VarveError(
      'RUN_UNRESOLVED',
      `The new file ${temporary}, which is to be removed, is not found, and neither is the folder that it was made in: its file system may not be mounted yet. Mount it, then run "varve recover". If the file is gone for good, remove runs/${header.id}.jsonl in the state folder.`,
      { context: { path: temporary }, retryable: true },
    )
  }
  await rm(temporary, { force: true })
}

/** A server that was killed counts as a client of the image for half a minute more. */
async function removeUnfinished(
  { header }: RunJournal,
  host: Host,
  { image, of }: TargetImage,
  arrivesBy: number,
  run: RunOptions,
): Promise<void> {
  const cluster = await host.rbd(of, run)
  while ((await cluster.imageId(image, run)) === undefined) {
    if (performance.now() >= arrivesBy) {
      if (await isClusterTold(of, host, run)) return // it was not made
      throw new VarveError(
        'RUN_UNRESOLVED',
        `The new RBD image ${image}, which is to be removed, is not found, and the domain ${of?.instance}, which tells its Ceph cluster, is not defined with it. Define it again, then run "varve recover". If the image is gone for good, remove runs/${header.id}.jsonl in the state folder.`,
        { context: { image, instance: of?.instance } },
      )
    }
    await sleep(ARRIVAL_INTERVAL_MS)
  }
  await assertImageUnused(cluster, image, run)
  await cluster.removeImage(image, run)
}

async function startAgain(
  { instance }: JournalStepOf<'power-off'>,
  host: Host,
  run: RunOptions,
): Promise<void> {
  emit(run, { type: 'stage', stage: 'start', message: `Starting ${instance}` })
  await host.start(instance, run)
}

/** Nothing of the restore would be done again, so it is not to be retried, whatever the command's own error says. */
function startError(error: unknown, instance: string): VarveError {
  const known = isVarveError(error) ? error : undefined
  const why = errorMessage(error).replace(/\.$/, '')
  return new VarveError(
    known?.code ?? 'COMMAND_FAILED',
    `${instance} was not started: ${why}. Its start is what is left to do (virsh start ${instance}).`,
    { context: { ...known?.context, instance }, cause: error },
  )
}

/**
 * An instance that was moved to another host meanwhile must not run here as well: RBD keeps two virtual machines from
 * one image no better than by handing its lock from one to the other.
 *
 * @throws RUN_UNRESOLVED
 */
async function assertStartable(
  journal: RunJournal,
  power: JournalStepOf<'power-off'>,
  host: Host,
  run: RunOptions,
): Promise<void> {
  const { instance } = power
  if (power.wasRunning && journal.of('powered-off').length === 0) await waitUntilOff(power, host, run)
  for (const { name: disk, path } of await disksOf(instance, host, run)) {
    const image = rbdImageOf(path)
    if (image === undefined) continue
    if (!(await host.waitUntilOff(instance, 0, run))) return // it is what has them open
    const cluster = await host.rbd({ instance, disk }, run)
    await assertImageUnused(cluster, image, run).catch(error => {
      if (isVarveError(error, 'DISK_BUSY')) throw openElsewhere(journal, instance, image, error)
      if (!isImageGone(error)) throw error // its start tells of one that is gone
    })
  }
}

/** None of an instance that is gone, which its start tells of. */
async function disksOf(instance: string, host: Host, run: RunOptions): Promise<InstanceDisks['disks']> {
  return host.disks(instance, run).then(
    ({ disks }) => disks,
    error => {
      if (isVarveError(error, 'INSTANCE_NOT_FOUND')) return []
      throw error
    },
  )
}

function openElsewhere(
  { header }: RunJournal,
  instance: string,
  image: string,
  cause: VarveError,
): VarveError {
  return new VarveError(
    'RUN_UNRESOLVED',
    `${instance} is not started: its RBD image ${image} is open elsewhere ("rbd status ${image}" shows where), such as in a virtual machine of another host, and two at a time would ruin its file systems. Stop that one, then run "varve recover". Where the instance is to stay there, remove runs/${header.id}.jsonl in the state folder.`,
    { context: { instance, image }, cause },
  )
}

/** What libvirt may take to end a QEMU that it was told to destroy, in milliseconds: it kills one that stays after 10 s. */
const DESTROY_MS = 15_000

/** A process that died in the middle may have told the guest to shut down: it still runs, and goes at any moment. */
async function waitUntilOff(
  { instance, timeoutMs }: JournalStepOf<'power-off'>,
  host: Host,
  run: RunOptions,
): Promise<void> {
  const waitMs = Math.max(timeoutMs, DESTROY_MS)
  emit(run, {
    type: 'stage',
    stage: 'power-off',
    message: `Waiting for ${instance}, which may be shutting down`,
  })
  if (await host.waitUntilOff(instance, waitMs, run)) return
  emit(run, {
    type: 'warning',
    message: `${instance} may have been told to shut down and still runs after ${waitMs / 1000} s. Start it again if it goes off after all.`,
  })
}

/**
 * Puts the new definition, then the new disks in place. Returns why libvirt refuses the definition: then
 * no disk was replaced.
 */
async function finishSwap(
  journal: RunJournal,
  { renames, images = [] }: JournalStepOf<'finish'>,
  host: Host,
  run: RunOptions,
): Promise<VarveError | undefined> {
  emit(run, { type: 'stage', stage: 'swap', message: 'Putting the new disks in place' })
  const left: Rename[] = []
  for (const step of renames) {
    if (await statIfThere(step.temporary)) left.push(step)
    else if (!(await isRenamed(step))) throw fileNotFound(journal, step)
  }
  const leftImages: { rename: ImageRename; cluster: RbdCluster }[] = []
  for (const rename of images) {
    const cluster = await host.rbd(rename.of, run)
    if ((await cluster.imageId(rename.image, run)) !== undefined) leftImages.push({ rename, cluster })
    else if ((await cluster.imageId(rename.target, run)) !== rename.id) throw notFound(journal, rename)
  }
  if (left.length + leftImages.length > 0) await assertNoSavedMemory(journal, host, run)
  for (const step of left) {
    await assertOff(step.target, run)
    await assertUntouched(journal, step)
    if (step.isNew) await assertNameIsFree(step).catch(error => throwUnresolved(step, error))
  }
  const replacements: Replacement[] = []
  for (const { rename, cluster } of leftImages)
    replacements.push({
      rename,
      cluster,
      replaces: await assertReplaceable(cluster, rename, journal.header.id, run),
    })
  const refusal = await changeDefinition(journal, host, run)
  if (refusal) {
    await journal.record({ step: 'undo' })
    return refusal
  }
  for (const step of left) await putInPlace(step).catch(error => throwUnresolved(step, error))
  for (const replacement of replacements) await replaceImage(replacement, journal.header.id, run)
  return undefined
}

/** An instance that runs on the disk by now was started by somebody else: what it wrote is not ours to drop. */
async function assertOff(target: string, run: RunOptions): Promise<void> {
  await assertUnused(target, run).catch(error => {
    if (!isVarveError(error, 'DISK_BUSY')) throw error
    throw stillInUse(target, error)
  })
}

/** What was written to the old disk since the restore ended, or took its place, is not ours to drop either. */
async function assertUntouched({ header }: RunJournal, step: Rename): Promise<void> {
  const { temporary, target, replaces } = step
  const change = replaces ? await changeSince(target, replaces) : 'none'
  if (change === 'none' || change === 'gone') return
  throw usedSince(target, {
    what: change === 'written' ? 'was written to' : 'is another file',
    restored: temporary,
    runId: header.id,
    moveAway: `move ${target} away`,
  })
}

/** Memory that was saved since belongs to the old disks: the instance was started by somebody else. */
async function assertNoSavedMemory(journal: RunJournal, host: Host, run: RunOptions): Promise<void> {
  const power = journal.of('power-off').at(-1)
  if (!power || !(await hasSavedMemory(power.instance, host, run))) return
  throw new VarveError(
    'RUN_UNRESOLVED',
    `The restored disks are complete, but ${power.instance} has its memory saved (virsh managedsave) since it ran on the old ones. Drop that memory with "virsh managedsave-remove ${power.instance}", then run "varve recover": it tells how to decide where the old disks were written to since.`,
    { context: { instance: power.instance } },
  )
}

async function hasSavedMemory(instance: string, host: Host, run: RunOptions): Promise<boolean> {
  return host.hasSavedMemory(instance, run).catch(error => {
    if (isVarveError(error, 'INSTANCE_NOT_FOUND')) return false // one that is to be defined anew
    throw error
  })
}

/** Not by the missing temporary alone: its file system may not be mounted, or somebody has removed it. */
async function isRenamed({ target, identity }: Rename): Promise<boolean> {
  return (await statIfThere(target)) !== undefined && (await fileIdentity(target)) === identity
}

function fileNotFound({ header }: RunJournal, { temporary, target }: Rename): VarveError {
  return new VarveError(
    'RUN_UNRESOLVED',
    `The restored file was complete as ${temporary}, and is found neither there nor at ${target}: its file system may not be mounted yet. Mount it, then run "varve recover". If the file is gone for good, remove runs/${header.id}.jsonl in the state folder, and restore again: ${target} may not hold the backup.`,
    { context: { path: temporary, target }, retryable: true },
  )
}

/** It was removed or moved, or is in another cluster, where the domain that tells the right one is gone. */
function notFound({ header }: RunJournal, { image, target, id }: ImageRename): VarveError {
  return new VarveError(
    'RUN_UNRESOLVED',
    `The restored RBD image was complete as ${image}, and is in the Ceph cluster that was asked under neither that name nor ${target} (its id is ${id}). Where a domain tells the cluster, define it again, then run "varve recover". If the image was removed, remove runs/${header.id}.jsonl in the state folder, and restore again: ${target} does not hold the backup.`,
    { context: { image, target, id } },
  )
}

function throwUnresolved({ temporary, target }: Rename, error: unknown): never {
  if (!isVarveError(error, 'TARGET_EXISTS')) throw error
  throw new VarveError(
    'RUN_UNRESOLVED',
    `The restored disk is complete as ${temporary}, but somebody else made a file at ${target}, which is left alone. Move that file away, then run "varve recover": the disk gets its name.`,
    { context: { path: target }, cause: error },
  )
}

/** Returns why libvirt does not take the definition, where it has surely not. */
async function changeDefinition(
  journal: RunJournal,
  host: Host,
  run: RunOptions,
): Promise<VarveError | undefined> {
  const [definition] = journal.of('define')
  const [backing] = journal.of('drop-backing')
  if ((!definition && !backing) || journal.of('defined').length > 0) return undefined
  if (definition) {
    const { instance, xml } = definition
    const taken = await takenName(journal, definition, host, run)
    if (taken) return taken
    const error = await refusalOf(host.define(xml, run), instance, host, run)
    const left =
      journal.of('written-in-place').length > 0 ? 'only its disks were restored' : 'nothing was changed'
    if (error)
      return refused(
        error,
        instance,
        `The definition of ${instance} in the backup is refused on this host, and ${left}: ${error.message} Restore the disks alone, or to files, and define the instance by hand.`,
      )
  }
  if (backing) {
    const { instance, disks } = backing
    const error = await refusalOf(host.dropBacking(instance, disks, run), instance, host, run)
    if (error)
      return refused(
        error,
        instance,
        `The definition of ${instance} names a backing file of ${disks.join(', ')} itself, which would show through the restored disk, and libvirt refuses it without; nothing was changed: ${error.message} Remove the element <backingStore> by hand (virsh edit ${instance}) while the instance is off, or restore in place (inPlace, --in-place).`,
      )
  }
  await journal.record({ step: 'defined' })
  return undefined
}

/**
 * Why a new instance is not defined: its name is taken by now. libvirt refuses that itself where the UUID is another one, but
 * not where somebody defined the original again. One on the new disks is ours, from a try that was cut short.
 */
async function takenName(
  journal: RunJournal,
  { instance, xml }: JournalStepOf<'define'>,
  host: Host,
  run: RunOptions,
): Promise<VarveError | undefined> {
  if (journal.of('powered-off').length > 0) return undefined // of an instance that is to be replaced
  const now = await host.describe(instance, run)
  if (now === undefined) return undefined
  const theirs = new Set(sourcesOf(now))
  if (sourcesOf(xml).every(source => theirs.has(source))) return undefined
  return new VarveError(
    'TARGET_EXISTS',
    `Somebody defined an instance ${instance} while its disks were restored, and it is left alone. Nothing was changed. Choose another name, or restore to that instance.`,
    { context: { instance } },
  )
}

function sourcesOf(xml: string): string[] {
  return readDomainXml(xml).disks.flatMap(({ source, rbd }) => source ?? (rbd ? RBD_PREFIX + rbd.image : []))
}

async function refusalOf(
  defining: Promise<void>,
  instance: string,
  host: Host,
  run: RunOptions,
): Promise<VarveError | undefined> {
  try {
    await defining
    return undefined
  } catch (error) {
    // Without an answer nobody knows whether it was taken.
    if (isVarveError(error, 'COMMAND_FAILED') && (await answers(host, instance, run))) return error
    throw error
  }
}

function refused(cause: VarveError, instance: string, message: string): VarveError {
  return new VarveError('COMMAND_FAILED', message, { context: { ...cause.context, instance }, cause })
}

async function answers(host: Host, instance: string, run: RunOptions): Promise<boolean> {
  return host.instance(instance, run).then(
    () => true,
    error => isVarveError(error, 'INSTANCE_NOT_FOUND'),
  )
}
