import { realpath, rm } from 'node:fs/promises'
import { setTimeout as sleep } from 'node:timers/promises'
import { headerChain } from './backing-chain.ts'
import { runCommand } from './command.ts'
import type { DiskSource } from './domain-xml.ts'
import { errorMessage, isVarveError, VarveError } from './errors.ts'
import { changeSince, type FileChange } from './file-state.ts'
import type { DiskOverlay, MergeRecord } from './host.ts'
import { assertUnused } from './image-lock.ts'
import { backupOfOverlay } from './late-overlays.ts'
import type { DiskState, LibvirtDomains } from './libvirt-domains.ts'
import { type LocatedOverlay, locateBase } from './overlay-base.ts'
import { presenceOf } from './presence.ts'
import { isQcow2, readImageInfo } from './qemu-img.ts'
import type { RunOptions } from './run-options.ts'
import { statIfThere } from './stat-if-there.ts'

/** How long a block-commit may take, in milliseconds: a day, as an overlay may be as large as its disk. */
const COMMIT_TIMEOUT_MS = 24 * 60 * 60 * 1000
/** For the map of an overlay on a large disk in many pieces, in milliseconds. */
const MAP_TIMEOUT_MS = 10 * 60_000
/** How often a snapshot is looked for that is still to come, in milliseconds. */
const ARRIVAL_INTERVAL_MS = 250

/** What is to be merged. */
export interface OverlayMerge {
  readonly instance: string
  readonly overlay: LocatedOverlay
  readonly merge: MergeRecord
}

/** See {@link Host.commitOverlay}. */
export async function commitOverlay(
  domains: LibvirtDomains,
  { instance, overlay, merge }: Omit<OverlayMerge, 'overlay'> & { readonly overlay: DiskOverlay },
  run: RunOptions,
): Promise<void> {
  try {
    const work = { instance, overlay: await locateBase(domains, overlay, run), merge }
    // Not one that was not there a moment ago: libvirt may be making it.
    if (await mergeOverlay(domains, work, run)) await rm(overlay.overlay, { force: true })
  } catch (error) {
    throw new VarveError(
      'BLOCK_COMMIT_FAILED',
      `Block commit failed: the overlay ${overlay.overlay} of disk ${overlay.disk} could not be merged back (${errorMessage(error)}). Nothing is lost as long as the overlay is there: do not delete it. Where the instance ${instance} runs, it goes on. Run "varve recover" once the cause is removed; no backup of this instance starts before.`,
      {
        context: { instance, disk: overlay.disk, overlay: overlay.overlay, base: overlay.base },
        cause: error,
        retryable: true,
      },
    )
  }
}

/**
 * Merges the overlay wherever the disk is, so that it can be removed. False where there is none.
 *
 * @throws OVERLAY_LEFT_OVER where there may be one whose file system is not mounted
 */
async function mergeOverlay(domains: LibvirtDomains, work: OverlayMerge, run: RunOptions): Promise<boolean> {
  const { instance, overlay, merge } = work
  const state = await settledState(domains, work, run)
  if (state === undefined) return mergeRenamed(domains, work, run)
  if (state.path === overlay.overlay) {
    if (state.running) await commitLive(domains, work, run)
    else await commitDefined(domains, work, run)
    return true
  }
  if (!(await isThere(overlay))) return false
  if (state.path !== overlay.base) {
    const isAnother = (await nameByNow(domains, work, run)) !== instance
    if (isAnother && !(await restsOn(state, overlay, run))) return mergeRenamed(domains, work, run)
    // Such as a snapshot that somebody made on top of the overlay: its data is needed, here or there.
    throw new VarveError(
      'OVERLAY_LEFT_OVER',
      `the disk writes to ${state.path} by now, and neither to the overlay nor to ${overlay.base}`,
    )
  }
  if (state.running) await assertNotTaken(domains, instance, overlay, run)
  if (!isPutBack(merge)) await mergeAbandoned(domains, work, state.running, run)
  return true
}

/** The same where no domain of that name has the disk, or it is another one's: who has the overlay could not be started without it. */
async function mergeRenamed(domains: LibvirtDomains, work: OverlayMerge, run: RunOptions): Promise<boolean> {
  const { instance, overlay, merge } = work
  const user = await domains.diskOn(overlay.overlay, run)
  if (user && (user.instance !== instance || user.disk !== overlay.disk)) {
    const { instance, disk } = user
    return mergeOverlay(domains, { instance, overlay: { ...overlay, disk }, merge }, run)
  }
  // Under its own name it was unplugged, and is to be back at the next start.
  if (user) {
    await commitForgotten(domains, work, true, run)
    return true
  }
  const name = await nameByNow(domains, work, run)
  // On a snapshot of the overlay, say.
  if (name !== undefined && name !== instance) return mergeOverlay(domains, { ...work, instance: name }, run)
  // No domain is called by the UUID: by that, nothing is done to one that has the name of an instance which is gone.
  const own = name === undefined ? { ...work, instance: merge.uuid ?? instance } : work
  await commitForgotten(domains, own, false, run)
  return true
}

/** What the instance is called by now that was backed up; undefined where it is gone. */
async function nameByNow(
  { virsh }: LibvirtDomains,
  { instance, merge: { uuid } }: OverlayMerge,
  run: RunOptions,
): Promise<string | undefined> {
  if (uuid === undefined) return instance
  const name = await virsh.run(run, 'domname', uuid).catch(error => {
    if (isVarveError(error, 'INSTANCE_NOT_FOUND')) return undefined
    throw error
  })
  return name?.trim()
}

/** Whether an overlay, or its base, is under the image that a disk is on, as it is after a snapshot of it. */
async function restsOn(
  { path, format }: Pick<DiskState, 'path' | 'format'>,
  { overlay, base }: DiskOverlay,
  run: RunOptions,
): Promise<boolean> {
  const below = await headerChain(path, format, run)
  const files = await Promise.all(below.map(({ file }) => realpath(file).catch(() => file)))
  return files.includes(overlay) || files.includes(base)
}

/** @throws OVERLAY_LEFT_OVER where that cannot be told */
async function isThere({ overlay, base, folder }: DiskOverlay): Promise<boolean> {
  const presence = await presenceOf(overlay, folder)
  if (presence !== 'unknown') return presence === 'there'
  throw new VarveError(
    'OVERLAY_LEFT_OVER',
    `it is not found, and neither is the folder that it was made in: its file system may not be mounted yet. Mount it. ${lost(base)} and remove the record of the run, runs/${backupOfOverlay(overlay) ?? '<id>'}.jsonl in the state folder`,
  )
}

const lost = (base: string) =>
  `If it is gone for good, so is what the guest wrote to it that is not merged: define the disk on ${base}`

/** Whether the base has all, as far as is recorded, and the disk was to be put onto it. */
function isPutBack({ state }: MergeRecord): boolean {
  return state === 'pivot' || state === 'merged'
}

/** Where the disk is once nothing that a process asked for before it died moves it; undefined where it is gone. */
async function settledState(
  domains: LibvirtDomains,
  work: OverlayMerge,
  run: RunOptions,
): ReturnType<LibvirtDomains['diskState']> {
  const { instance, overlay, merge } = work
  const state = await arrivedState(domains, work, run)
  if (!isPutBack(merge) || state?.path !== overlay.overlay) return state
  // The pivot may be under way. libvirt ends the job behind it only: then the disk is on its base, or stays here.
  if (state.running) await abortCommit(domains, work, run)
  const now = await domains.diskState(instance, overlay.disk, run)
  if (now?.path === overlay.overlay) await merge.record('unmerged')
  return now
}

/** Where the disk is once a snapshot that is under way has come; undefined where the domain or the disk is gone. */
async function arrivedState(
  domains: LibvirtDomains,
  { instance, overlay, merge: { arrivesBy } }: OverlayMerge,
  run: RunOptions,
): ReturnType<LibvirtDomains['diskState']> {
  for (;;) {
    const state = await domains.diskState(instance, overlay.disk, run)
    const mayCome = arrivesBy !== undefined && state?.running && state.path === overlay.base
    if (!mayCome || (await statIfThere(overlay.overlay))) return state
    if (performance.now() >= arrivesBy) break
    await sleep(ARRIVAL_INTERVAL_MS)
  }
  // libvirt lets nobody at QEMU's monitor while it makes a snapshot: one that it has begun is done once it answers.
  await domains.qmp(instance, run)
  return domains.diskState(instance, overlay.disk, run)
}

/**
 * The domain is gone, or the disk has another name by now, or was unplugged. What it was on last is told by the journal
 * alone, but for one that the definition still puts on the overlay.
 */
async function commitForgotten(
  domains: LibvirtDomains,
  work: OverlayMerge,
  isDefined: boolean,
  run: RunOptions,
): Promise<void> {
  const { merge, overlay } = work
  if (isDefined && merge.state !== 'merged') await assertThere(overlay)
  if (!(await isThere(overlay)) || merge.state === 'merged') return
  if (merge.state === 'pivot') {
    throw new VarveError(
      'OVERLAY_LEFT_OVER',
      `the disk was about to be put back onto ${overlay.base}, and where it is cannot be told any more; if its instance has run since, it did so on that file, and the overlay can go`,
    )
  }
  if (isDefined) return commitDefined(domains, work, run)
  const successor = await domains.diskOn(overlay.base, run)
  if (successor) {
    const { instance, disk } = successor
    const state = await domains.diskState(instance, disk, run)
    const abandoned = { instance, overlay: { ...overlay, disk }, merge }
    return mergeAbandoned(domains, abandoned, state?.running ?? true, run)
  }
  await assertNoSnapshot(domains, overlay, run)
  // Where nothing tells: under a backup that lives the instance has just gone; after one that died anything may have been.
  const change = await baseChange(work)
  await assertMergeable(work, change === 'unknown' && !merge.died ? 'none' : change, run)
  await commitOffline(domains, work, run)
}

/** @throws OVERLAY_LEFT_OVER where a domain is on a snapshot of the base, which would change under it */
async function assertNoSnapshot(
  domains: LibvirtDomains,
  overlay: DiskOverlay,
  run: RunOptions,
): Promise<void> {
  const user = await domains.findDisk(async ({ source: path, format }) => {
    if (format !== 'qcow2') return false
    return restsOn({ path, format }, overlay, run).catch(error => {
      if (isVarveError(error, 'DISK_UNSUPPORTED')) return false // an image that nobody can open rests on nothing
      throw error
    })
  }, run)
  if (!user) return
  throw new VarveError(
    'OVERLAY_LEFT_OVER',
    `its base is ${overlay.base}, and the disk ${user.disk} of ${user.instance} is on a snapshot of it, or of the overlay, which would not fit any more. Move the overlay away, or have that disk on a full copy (qemu-img convert)`,
  )
}

/** What is removed is the overlay of a disk that is defined on its base again. So one that a definition names was removed by others. */
async function assertThere(overlay: DiskOverlay): Promise<void> {
  if (await isThere(overlay)) return
  throw new VarveError(
    'OVERLAY_LEFT_OVER',
    `the disk is defined to be on it, and somebody has removed it. Put it back. ${lost(overlay.base)}`,
  )
}

/** The domain does not run, and is defined to be on the overlay. Its disk may have been run without it, on another host. */
async function commitDefined(domains: LibvirtDomains, work: OverlayMerge, run: RunOptions): Promise<void> {
  await assertThere(work.overlay)
  const change = await baseChange(work)
  await assertMergeable(work, change === 'unknown' ? 'none' : change, run)
  await commitOffline(domains, work, run)
}

/**
 * Refuses an overlay that does not belong to its base any more, or by which newer writes could be undone, unless the base is
 * newer by what was merged.
 */
async function assertMergeable(
  { overlay, merge }: OverlayMerge,
  change: BaseChange,
  run: RunOptions,
): Promise<void> {
  const isMergeable = change === 'none' || (change !== 'replaced' && merge.state !== undefined)
  if (isMergeable || !(await hasData(overlay.overlay, run))) return
  throw change === 'replaced' ? anotherFile(overlay) : writtenSince(overlay)
}

function writtenSince({ base }: DiskOverlay): VarveError {
  return new VarveError(
    'OVERLAY_LEFT_OVER',
    `${base} was written to since the overlay was, or nothing tells that it was not: the instance may have run without the overlay, by another definition or on another host. ${HOW_TO_DECIDE}`,
  )
}

function anotherFile({ base }: DiskOverlay): VarveError {
  return new VarveError(
    'OVERLAY_LEFT_OVER',
    `${base} is another file by now than the one which the overlay was made on, such as a copy that was put back, or the disk of an instance that was installed anew. If the two were copied together, such as to a larger file system, the overlay belongs to it and holds. ${HOW_TO_DECIDE}`,
  )
}

/**
 * The disk is on its base, and no merge put it there: somebody changed the domain's definition, or libvirtd died before
 * it had. What the guest wrote to the overlay is merged as long as the base is as it was then.
 */
async function mergeAbandoned(
  domains: LibvirtDomains,
  work: OverlayMerge,
  running: boolean,
  run: RunOptions,
): Promise<void> {
  const { instance, overlay } = work
  await assertUnused(overlay.overlay, run) // by a QEMU that this libvirt knows nothing of
  if (!(await hasData(overlay.overlay, run))) return // it was never in use
  const change = await baseChange(work)
  if (change === 'replaced') throw anotherFile(overlay)
  if (running || change !== 'none') throw changedDefinition(overlay)
  await assertNoSavedMemory(domains, instance, run)
  // Back onto the overlay first: from there on this is like any other, also when it is cut short.
  await domains.redefine(instance, { disks: { [overlay.disk]: onOverlay(overlay) } }, run)
  const now = await domains.diskState(instance, overlay.disk, run)
  if (now?.running && now.path === overlay.base) {
    await domains.redefine(instance, { disks: { [overlay.disk]: overlay.source } }, run)
    throw changedDefinition(overlay)
  }
  await commitOffline(domains, work, run)
}

function changedDefinition({ base }: DiskOverlay): VarveError {
  return new VarveError(
    'OVERLAY_LEFT_OVER',
    `the definition was changed: the disk is on ${base}, without what the guest wrote to the overlay since the snapshot, and that file may have been written to since. ${HOW_TO_DECIDE}`,
  )
}

const HOW_TO_DECIDE =
  'Merged now, both would be mixed. Decide which of the two holds, while nothing runs on either. If it is the base, define the disk on it and move the overlay away; if it is the overlay, merge it by hand (qemu-img commit). Then run "varve recover".'

const onOverlay = ({ overlay }: DiskOverlay) => ({ path: overlay, format: 'qcow2' }) as const

/** What became of a base since the overlay is on top of it; `unknown` of a device, which has no times. */
type BaseChange = Exclude<FileChange, 'gone'> | 'unknown'

/** @throws OVERLAY_LEFT_OVER where the base is not found */
async function baseChange({
  overlay: { base, overlay },
  merge: { frozen },
}: OverlayMerge): Promise<BaseChange> {
  const below = await statIfThere(base)
  if (!below) throw baseNotFound(base)
  if (frozen) {
    const change = await changeSince(base, frozen)
    if (change === 'gone') throw baseNotFound(base)
    return change
  }
  // A process that died right after the snapshot, or a former version, has recorded no state: the times of the two files tell
  // it, where one clock made both.
  const above = await statIfThere(overlay)
  if (!above || !below.isFile() || below.dev !== above.dev || below.mtimeMs === above.mtimeMs)
    return 'unknown'
  return below.mtimeMs > above.mtimeMs ? 'written' : 'none'
}

function baseNotFound(base: string): VarveError {
  return new VarveError(
    'OVERLAY_LEFT_OVER',
    `the disk itself, ${base}, is not found: its file system may not be mounted yet. Mount it. If the disk was removed, and is not needed any more, move the overlay away and run "varve recover"`,
  )
}

/** Whether an overlay that is not in use holds anything; its base may be. */
async function hasData(overlay: string, run: RunOptions): Promise<boolean> {
  if (!(await isQcow2(overlay))) return false // libvirt died while it made it
  let found = false
  await runCommand('qemu-img', ['map', '--force-share', '--output=json', '-f', 'qcow2', overlay], {
    ...run,
    timeoutMs: MAP_TIMEOUT_MS,
    onLine: line => {
      found ||= /"depth": 0\b/.test(line) && !/"present": false/.test(line)
    },
  })
  return found
}

/** The saved state names the overlay, and the guest could not go on without it. */
async function assertNoSavedMemory(
  domains: LibvirtDomains,
  instance: string,
  run: RunOptions,
): Promise<void> {
  const isSaved = await domains.hasSavedMemory(instance, run).catch(error => {
    if (isVarveError(error, 'INSTANCE_NOT_FOUND')) return false
    throw error
  })
  if (!isSaved) return
  throw new VarveError(
    'OVERLAY_LEFT_OVER',
    'the memory of the instance was saved (virsh managedsave) while it wrote to the overlay; start the instance first',
  )
}

/**
 * The definition says that the disk is on its base. libvirt may all the same be about to put the overlay on
 * top, for a snapshot that nobody waits for any more: QEMU itself knows, and answers when that is done.
 */
async function assertNotTaken(
  domains: LibvirtDomains,
  instance: string,
  overlay: DiskOverlay,
  run: RunOptions,
): Promise<void> {
  if (!(await domains.qmp(instance, run)).uses(overlay.overlay)) return
  throw new VarveError('OVERLAY_LEFT_OVER', 'a snapshot is about to take it into use')
}

/** Ends a commit that a former try left behind. False where there is none. */
async function abortCommit(
  { virsh }: LibvirtDomains,
  { instance, overlay }: OverlayMerge,
  run: RunOptions,
): Promise<boolean> {
  const blockJob = (option: string) => virsh.onDomain(run, instance, 'blockjob', overlay.disk, option)
  if (!/commit/i.test(await blockJob('--raw'))) return false
  await blockJob('--abort')
  return true
}

/** From here on the base is newer than the overlay, also where this is cut short. */
async function recordBegin(merge: MergeRecord): Promise<void> {
  if (merge.state === undefined) await merge.record('merging')
}

async function commitLive(domains: LibvirtDomains, work: OverlayMerge, run: RunOptions): Promise<void> {
  const { instance, overlay, merge } = work
  const slow = { ...run, timeoutMs: COMMIT_TIMEOUT_MS }
  // Both by name: a disk that has left the overlay meanwhile is not merged further down a chain that the instance has of
  // its own, such as into a template. Without --pivot: a program that outlives this process must not put the disk on
  // its base when nobody knows of it.
  const options = ['--base', overlay.base, '--top', overlay.overlay, '--active', '--wait']
  const commit = () => domains.virsh.onDomain(slow, instance, 'blockcommit', overlay.disk, ...options)
  await recordBegin(merge)
  await commit().catch(async error => {
    if (!isVarveError(error, 'COMMAND_FAILED') || !(await abortCommit(domains, work, run))) throw error
    await commit()
  })
  await merge.record('pivot')
  const questions = [['blockjob', overlay.disk, '--pivot'], ['dumpxml']]
  const { answers, errors, failure } = await domains.virsh.tryAll(slow, instance, ...questions)
  const [, xml = ''] = answers
  // A transient domain may have gone right after the pivot. Had it gone before that, both commands would say so.
  const [error, ...others] = errors
  const isGone = others.length === 0 && xml.trim() === '' && /failed to get domain/i.test(error ?? '')
  if (error !== undefined && !isGone) throw failure(error)
  const after = isGone ? undefined : await domains.stateOf(xml, overlay.disk, run)
  if (after === undefined || after.path === overlay.base) return merge.record('merged')
  throw new VarveError(
    'BLOCK_COMMIT_FAILED',
    `${overlay.disk} is on ${after.path} instead of ${overlay.base}`,
  )
}

/** The domain does not run (any more), or is gone. */
async function commitOffline(
  domains: LibvirtDomains,
  { instance, overlay, merge }: OverlayMerge,
  run: RunOptions,
): Promise<void> {
  await assertNoSavedMemory(domains, instance, run)
  const info = await readImageInfo(overlay.overlay, 'qcow2', run)
  if (info.backing === undefined || (await realpath(info.backing)) !== overlay.base) {
    throw new VarveError(
      'OVERLAY_LEFT_OVER',
      `its backing file is ${info.backing ?? 'none'}, not ${overlay.base}`,
    )
  }
  // Before it is recorded that the base gets newer: what somebody has open does not, by this.
  for (const path of [overlay.base, overlay.overlay]) await assertUnused(path, run)
  await recordBegin(merge)
  await runCommand('qemu-img', ['commit', '-f', 'qcow2', '-d', overlay.overlay], {
    ...run,
    timeoutMs: COMMIT_TIMEOUT_MS,
  })
  await merge.record('merged')
  const redefine = (disk: DiskSource) => domains.redefine(instance, { disks: { [overlay.disk]: disk } }, run)
  await redefine(overlay.source).catch(error => {
    if (!isVarveError(error, 'INSTANCE_NOT_FOUND')) throw error // a transient domain is gone once it stops
  })
  const now = await domains.diskState(instance, overlay.disk, run)
  if (now?.running && now.path === overlay.overlay) {
    await merge.record('unmerged')
    await redefine(onOverlay(overlay)) // where it is to go on when it is off
    throw new VarveError('OVERLAY_LEFT_OVER', 'the instance was started on it meanwhile')
  }
}
