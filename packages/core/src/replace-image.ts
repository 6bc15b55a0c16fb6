import { errorMessage, isVarveError, VarveError } from './errors.ts'
import type { ImageRename } from './journal.ts'
import { RBD_PREFIX, type RbdCluster } from './rbd.ts'
import { assertImageUnused } from './restore-plan-rbd.ts'
import { emit, type RunOptions } from './run-options.ts'

/** A complete image that is to take its name. */
export interface Replacement {
  readonly rename: ImageRename
  readonly cluster: RbdCluster
  /** Whether there is an image of that name, to be put aside. */
  readonly replaces: boolean
}

/**
 * Gives a complete image the name of the one that it replaces. Two renames: for a moment there is no image of that
 * name. May be cut short and called again, as long as the image has its temporary name.
 */
export async function replaceImage(
  { rename: { image, target }, cluster, replaces }: Replacement,
  runId: string,
  run: RunOptions,
): Promise<void> {
  if (replaces) await cluster.renameImage(target, replacedName(target, runId), run)
  await cluster.renameImage(image, target, run)
}

/**
 * Refuses to replace an image that is open, or that nobody knew of. Returns whether there is an image to put aside.
 *
 * @throws RUN_UNRESOLVED
 */
export async function assertReplaceable(
  cluster: RbdCluster,
  { image, target, replaces, isNew }: ImageRename,
  runId: string,
  run: RunOptions,
): Promise<boolean> {
  if (isNew) {
    if ((await cluster.imageId(target, run)) === undefined) return false
    throw notReplaced(image, target)
  }
  try {
    await assertImageUnused(cluster, target, run)
    const now = replaces && (await cluster.imageState(target, run))
    if (replaces && now && (now.id !== replaces.id || now.writtenAt !== replaces.writtenAt))
      throw usedSince(`${RBD_PREFIX}${target}`, {
        what: now.id === replaces.id ? 'was written to' : 'is another image',
        restored: `the RBD image ${image}`,
        runId,
        moveAway: 'rename that image (rbd rename)',
      })
    return true
  } catch (error) {
    if (isVarveError(error, 'DISK_NOT_FOUND')) return false
    if (isVarveError(error, 'DISK_BUSY')) throw stillInUse(`${RBD_PREFIX}${target}`, error)
    throw error
  }
}

/** Removes the image that {@link replaceImage} has put aside; one that cannot be removed is a warning. */
export async function removeReplaced(
  cluster: () => Promise<RbdCluster>,
  { target }: ImageRename,
  runId: string,
  run: RunOptions,
): Promise<void> {
  const old = replacedName(target, runId)
  const remove = async () => (await cluster()).removeImage(old, run)
  await remove().catch(error => {
    const message = `The image that was replaced stays as ${old}: ${errorMessage(error)} Remove it by hand (rbd snap purge, rbd rm).`
    emit(run, { type: 'warning', message })
  })
}

function replacedName(target: string, runId: string): string {
  return `${target}.varve-replaced-${runId}`
}

/** Somebody else has made an image of the name that was free when the restore began. */
function notReplaced(image: string, target: string): VarveError {
  return new VarveError(
    'RUN_UNRESOLVED',
    `The restored image is complete as ${image}, but somebody else made an image ${target}, which is left alone. Rename that one (rbd rename), then run "varve recover": the restored image gets its name.`,
    { context: { image, target } },
  )
}

/** The error of a restored disk whose place is taken by somebody who started the instance again. */
export function stillInUse(path: string, cause: unknown): VarveError {
  return new VarveError(
    'RUN_UNRESOLVED',
    `The restored disk is complete, but cannot take the place of ${path}: that is in use by a virtual machine or another program. Shut it off, then run "varve recover": it replaces the disk, or where that was written to since, tells how to decide.`,
    { context: { path }, cause },
  )
}

/** How the error of {@link usedSince} names things. */
interface UsedSince {
  /** What happened, such as `was written to`. */
  readonly what: string
  /** What the restore has made. */
  readonly restored: string
  readonly runId: string
  readonly moveAway: string
}

/** The error of a restored disk whose place is taken by what nobody has seen: only a person may drop that. */
export function usedSince(path: string, { what, restored, runId, moveAway }: UsedSince): VarveError {
  return new VarveError(
    'RUN_UNRESOLVED',
    `The restored disk is complete as ${restored}, but ${path}, which it was to replace, ${what} since the restore ended. It is left alone. To have the restored disk, ${moveAway} and run "varve recover": the disk gets its name. To keep what is there, remove ${restored} and runs/${runId}.jsonl in the state folder.`,
    { context: { path } },
  )
}
