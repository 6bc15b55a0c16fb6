import { setTimeout as sleep } from 'node:timers/promises'
import { backupOfMark } from './backup-plan.ts'
import { abortError, isVarveError, VarveError } from './errors.ts'
import type { RbdDisk } from './host.ts'
import type { TargetImage } from './journal.ts'
import type { ManifestDisk } from './manifest.ts'
import { RBD_PREFIX, type RbdCluster } from './rbd.ts'
import { readRbdDisk } from './rbd-disk.ts'
import { assertFits } from './restore-plan.ts'
import type { RunOptions } from './run-options.ts'

/** A client that was killed counts as one that has the image open for half a minute more; in milliseconds. */
const WATCH_TIMEOUT_MS = 45_000

/** How one disk is written to an RBD image. */
export interface RbdRestore {
  readonly disk: ManifestDisk
  readonly format: 'rbd'
  /** `rbd:<pool>/[<namespace>/]<image>` */
  readonly target: string
  /** `<pool>/[<namespace>/]<image>` */
  readonly image: string
  readonly cluster: RbdCluster
  /** The disk whose cluster that is, where it is not the disk that is restored. */
  readonly of?: TargetImage['of']
  /** The image that is there now. */
  readonly existing?: RbdDisk
  /** The new image that takes the target's name once it is complete; absent for a restore in place. */
  readonly temporary?: string
}

interface RbdPlanOptions {
  readonly inPlace: boolean
  readonly runId: string
}

interface RbdPathOptions extends RbdPlanOptions {
  readonly overwrite: boolean
  readonly looksAtImages?: boolean
}

/** The restore of a disk of an instance which is an RBD image. @throws DISK_UNSUPPORTED, RBD_SNAPSHOT_PROTECTED */
export async function planRbdDisk(
  disk: ManifestDisk,
  existing: RbdDisk,
  { inPlace, runId }: RbdPlanOptions,
  run: RunOptions,
): Promise<RbdRestore> {
  const { image, path: target, cluster } = existing
  if (inPlace) return { disk, format: 'rbd', target, image, cluster, existing }
  const { group, mirrored } = existing.state
  if (group !== undefined || mirrored) {
    const tie = mirrored ? 'is mirrored' : `is in the group ${group}`
    throw new VarveError(
      'DISK_UNSUPPORTED',
      `The RBD image ${image} ${tie}, and a new one in its place would not be. Restore in place (inPlace, --in-place).`,
      { context: { disk: disk.name, image, ...(group !== undefined && { group }) } },
    )
  }
  const foreign = existing.state.snapshots.find(({ name }) => backupOfMark(name) === undefined)
  if (foreign) {
    throw new VarveError(
      'DISK_UNSUPPORTED',
      `The RBD image ${image} has the snapshot ${foreign.name}, which would be lost with it. Remove the snapshot, or restore in place (inPlace, --in-place).`,
      { context: { disk: disk.name, image, snapshot: foreign.name } },
    )
  }
  const [clone] = await cluster.clones(image, run)
  if (clone !== undefined) {
    throw new VarveError(
      'RBD_SNAPSHOT_PROTECTED',
      `The RBD image ${image} cannot be replaced by a new one, as the clone ${clone} rests on a snapshot of it. Flatten the clone (rbd flatten), or restore in place (inPlace, --in-place).`,
      { context: { disk: disk.name, image, clone } },
    )
  }
  return { disk, format: 'rbd', target, image, cluster, existing, temporary: temporaryImage(image, runId) }
}

/** The restore to an RBD image by its name. @throws TARGET_EXISTS, DISK_NOT_FOUND, DISK_BUSY, TARGET_TOO_SMALL */
export async function planRbdPath(
  disk: ManifestDisk,
  image: string,
  cluster: RbdCluster,
  { inPlace, overwrite, runId, looksAtImages = true }: RbdPathOptions,
  run: RunOptions,
): Promise<RbdRestore> {
  const target = `${RBD_PREFIX}${image}`
  if (!looksAtImages) return { disk, format: 'rbd', target, image, cluster }
  const existing = await readRbdDisk(disk.name, image, cluster, run).catch(error => {
    if (isVarveError(error, 'DISK_NOT_FOUND') && !inPlace) return undefined
    throw error
  })
  if (!existing)
    return { disk, format: 'rbd', target, image, cluster, temporary: temporaryImage(image, runId) }
  if (!inPlace && !overwrite) {
    throw new VarveError(
      'TARGET_EXISTS',
      `${target} is there already. Choose another name, or ask for it to be overwritten (overwrite, --overwrite).`,
      { context: { disk: disk.name, path: target } },
    )
  }
  if (await cluster.isOpen(image, run)) throw imageBusy(image)
  if (inPlace) assertFits(disk, existing)
  return planRbdDisk(disk, existing, { inPlace, runId }, run)
}

/** Waits for a client that ended without closing the image. @throws DISK_BUSY where one has it open for longer */
export async function assertImageUnused(cluster: RbdCluster, image: string, run: RunOptions): Promise<void> {
  const deadline = performance.now() + WATCH_TIMEOUT_MS
  while (await cluster.isOpen(image, run)) {
    if (performance.now() > deadline) throw imageBusy(image)
    if (run.signal?.aborted) throw abortError(run.signal)
    await sleep(1_000)
  }
}

function imageBusy(image: string): VarveError {
  return new VarveError(
    'DISK_BUSY',
    `The RBD image ${image} is open in a virtual machine or another program ("rbd status ${image}" shows where). Stop that, or choose another target.`,
    { context: { path: `${RBD_PREFIX}${image}` }, retryable: true },
  )
}

function temporaryImage(image: string, runId: string): string {
  return `${image}.varve-restore-${runId}`
}
