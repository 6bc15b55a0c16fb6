import { errorMessage, isVarveError, VarveError } from './errors.ts'
import type { ImageRename } from './journal.ts'
import { RBD_PREFIX, type RbdCluster } from './rbd.ts'
import { assertImageUnused } from './restore-plan-rbd.ts'
import { emit, type RunOptions } from './run-options.ts'

/**
 * Gives a complete image the name of the one that it replaces. Two renames: for a moment there is no image of that
 * name. May be cut short and called again, as long as the image has its temporary name.
 */
export async function replaceImage(
  cluster: RbdCluster,
  rename: ImageRename,
  runId: string,
  run: RunOptions,
): Promise<void> {
  const { image, target } = rename
  if (await assertReplaceable(cluster, rename, run))
    await cluster.renameImage(target, replacedName(target, runId), run)
  await cluster.renameImage(image, target, run)
}

/**
 * Refuses what {@link replaceImage} would. Returns whether there is an image to put aside.
 *
 * @throws RUN_UNRESOLVED
 */
export async function assertReplaceable(
  cluster: RbdCluster,
  { image, target, isNew }: ImageRename,
  run: RunOptions,
): Promise<boolean> {
  if ((await cluster.imageId(target, run)) === undefined) return false
  if (isNew) throw notReplaced(image, target)
  await assertImageUnused(cluster, target, run).catch(error => {
    if (!isVarveError(error, 'DISK_BUSY')) throw error
    throw stillInUse(`${RBD_PREFIX}${target}`, error)
  })
  return true
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
    `The restored disk is complete, but cannot take the place of ${path}: that is in use by a virtual machine or another program. Shut it off, then run "varve recover": the disk is replaced and what was written to it since is lost. Copy the disk before where that is needed.`,
    { context: { path }, cause },
  )
}
