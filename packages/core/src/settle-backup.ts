import { setTimeout as sleep } from 'node:timers/promises'
import { assertPublished } from './assert-published.ts'
import { type ErrorCode, errorMessage, isVarveError, VarveError } from './errors.ts'
import type { DiskOverlay, Host, MergeRecord } from './host.ts'
import type { JournalStepName, JournalStepOf, RunJournal } from './journal.ts'
import { watchMerge } from './overlay-space.ts'
import { stopExports } from './qemu-nbd.ts'
import type { RbdCluster } from './rbd.ts'
import { removeFolder } from './remove-folder.ts'
import { emit, type RunOptions } from './run-options.ts'
import type { StorageDriver } from './storage.ts'

/** How long the storage may take for each call of a clean-up, in milliseconds. */
const STORAGE_TIMEOUT_MS = 60_000

/**
 * How long a snapshot may take to come that a process asked for before it died, in milliseconds: libvirt makes it as soon
 * as nothing else is being done to the domain.
 */
const SNAPSHOT_ARRIVAL_MS = 5_000

/** What is recorded after a snapshot also where it failed. */
const AFTER_ANY_SNAPSHOT: ReadonlySet<JournalStepName> = new Set(['filesystem-thawed', 'resumed'])

/** What {@link settleBackup} works with. */
export interface SettleOptions {
  readonly host: Host
  /** The storage of the backup. Without it the instance is brought back onto its disks all the same. */
  readonly storage: StorageDriver | undefined
  /**
   * Waits for what the storage still does for the backup, which is not before the overlays are merged. False where the storage
   * does not answer. Default: it does nothing any more.
   */
  readonly storageEnds?: () => Promise<boolean>
  /**
   * The clusters of the disks that are RBD images, by their names, where the process has them still: what took the snapshots also
   * removes them, and no definition that was changed since leads elsewhere. Default: those that the host tells.
   */
  readonly clusters?: ReadonlyMap<string, RbdCluster> | undefined
  /** Is called once it is sure that the backup is published: what fails from then on leaves a good backup. */
  readonly onPublished?: () => void
  /** Whether the backup's process died, so that what it had begun may be under way. Default: false. */
  readonly died?: boolean
  /** Bytes to keep free where overlays are merged; below, it warns. Default: that of a backup. */
  readonly overlayReserve?: number | undefined
  /** Without a signal: a clean-up is not given up half-way. */
  readonly run: Omit<RunOptions, 'signal'>
}

/**
 * Ends a backup: after success, failure or, by `recover`, the death of its process. Brings the instance back
 * onto its disks; then, if the backup is published, removes the bitmaps and snapshots that the backup replaces,
 * else those and the objects that it had begun. Every step looks at what is there first, so that this
 * may be cut short and called again.
 */
export async function settleBackup(
  journal: RunJournal,
  options: SettleOptions,
): Promise<{ published: boolean }> {
  const { host, storage, died = false, clusters, run } = options
  const { instance, disks } = journal.header
  const names = disks.map(({ name }) => name)

  const failures: unknown[] = []
  // Whatever fails is no reason to leave overlays to grow.
  const attempt = (work: Promise<void>) => work.catch(error => void failures.push(error))
  for (const { folder } of journal.of('export')) await attempt(stopExports(folder, names))
  // The agent of a guest that stands still does not answer.
  if (journal.of('suspend').length > journal.of('resumed').length) await attempt(host.resume(instance, run))
  const frozen = journal.of('filesystem-freeze').length > journal.of('filesystem-thawed').length
  if (frozen) await attempt(host.thawFilesystems(instance, run))
  const overlays = journal.of('snapshot').flatMap(step => step.overlays)
  if (overlays.length > 0) emit(run, { type: 'stage', stage: 'thaw', message: 'Merging the overlays back' })
  // Also where the process lives: a virsh that was ended, such as for taking too long, leaves libvirt at it.
  const mayCome = journal.steps.findLast(({ step }) => !AFTER_ANY_SNAPSHOT.has(step))?.step === 'snapshot'
  const arrivesBy = performance.now() + (died ? SNAPSHOT_ARRIVAL_MS : 0)
  {
    await using _ = watchMerge(overlays, options.overlayReserve, run)
    for (const overlay of overlays)
      await attempt(commitWithRetry(journal, host, { overlay, died, ...(mayCome && { arrivesBy }) }, run))
  }
  const answers = (await options.storageEnds?.()) ?? true
  if (failures.length > 0) throw worstOf(failures)

  const publish = journal.of('publish').at(-1)
  const published =
    journal.of('published').length > 0 ||
    (publish !== undefined && (await isPublished(journal, storage, publish)))
  if (publish && published) {
    options.onPublished?.()
    emit(run, { type: 'stage', stage: 'retire', message: 'Removing the bitmaps that this backup replaces' })
    const [begun] = journal.of('bitmap-add')
    const changes = disks.map(disk => {
      const seal = begun?.disks.includes(disk.name) ? { seal: begun.bitmap } : {}
      return { disk, ...seal, remove: publish.retire[disk.name] ?? [] }
    })
    const needed = changes.filter(({ seal, remove }) => seal !== undefined || remove.length > 0)
    if (needed.length > 0) await host.changeBitmaps(instance, needed, run)
    for (const { disks: images } of journal.of('rbd-snapshot')) {
      for (const image of images) {
        const retired = publish.retireSnapshots?.[image.disk] ?? []
        await removeSnapshots({ host, instance, clusters }, image, retired, run)
      }
    }
  } else {
    for (const { bitmap, disks: marked } of journal.of('bitmap-add')) {
      const begun = disks.filter(({ name }) => marked.includes(name))
      await host.changeBitmaps(
        instance,
        begun.map(disk => ({ disk, remove: [bitmap] })),
        run,
      )
    }
    for (const { snapshot, disks: images } of journal.of('rbd-snapshot')) {
      for (const image of images) await removeSnapshots({ host, instance, clusters }, image, [snapshot], run)
    }
    // Where there is a manifest to be removed the storage was asked for it, and answered.
    const removesFrom = answers || publish ? storage : undefined
    for (const { folder } of journal.of('upload')) await removeObjects(removesFrom, folder, run)
  }
  await journal.settled()
  return { published }
}

/** The one that tells most: an overlay that is left has more to be done about it than a guest that is frozen. */
export function worstOf(failures: readonly unknown[]): unknown {
  const worst = failures.find(error => isVarveError(error, 'BLOCK_COMMIT_FAILED')) ?? failures[0]
  if (failures.length === 1 || !isVarveError(worst)) return worst
  const { code, message, context, retryable } = worst
  const others = failures.filter(error => error !== worst).map(errorMessage)
  const cause = new AggregateError(failures)
  return new VarveError(code, `${message} And: ${others.join(' ')}`, { context, cause, retryable })
}

async function commitWithRetry(
  journal: RunJournal,
  host: Host,
  { overlay, ...known }: { readonly overlay: DiskOverlay } & Pick<MergeRecord, 'died' | 'arrivesBy'>,
  run: RunOptions,
): Promise<void> {
  const { instance, uuid } = journal.header
  const bases = journal.of('frozen').flatMap(step => step.bases)
  const frozen = bases.find(base => base.overlay === overlay.overlay)
  const merge: MergeRecord = {
    get state() {
      const steps = journal.steps.filter(step => 'overlay' in step)
      return steps.findLast(step => step.overlay === overlay.overlay)?.step
    },
    ...known,
    ...(frozen && { frozen }),
    ...(uuid !== undefined && { uuid }),
    record: async step => {
      // No reason to let the overlay grow: should this process die now, it is kept, and looked at by a person.
      await journal
        .record({ step, overlay: overlay.overlay })
        .catch(error => emit(run, { type: 'warning', message: errorMessage(error) }))
    },
  }
  try {
    await host.commitOverlay(instance, overlay, merge, run)
  } catch (error) {
    emit(run, { type: 'warning', message: `${errorMessage(error)} Trying once more.` })
    await sleep(1_000) // QEMU may still be ending the job that failed
    await host.commitOverlay(instance, overlay, merge, run)
  }
}

async function removeSnapshots(
  { host, instance, clusters }: Pick<SettleOptions, 'host' | 'clusters'> & { readonly instance: string },
  { disk, image }: { disk: string; image: string },
  snapshots: readonly string[],
  run: RunOptions,
): Promise<void> {
  if (snapshots.length === 0) return
  const known = clusters?.get(disk)
  if (known) {
    try {
      return await removeFrom(known, image, snapshots, run)
    } catch (error) {
      if (!isVarveError(error, 'CEPH_ACCESS_DENIED')) throw error // its key was changed since
    }
  }
  await removeFrom(await host.rbd({ instance, disk }, run), image, snapshots, run)
}

async function removeFrom(
  cluster: RbdCluster,
  image: string,
  snapshots: readonly string[],
  run: RunOptions,
): Promise<void> {
  for (const snapshot of snapshots) {
    await cluster.removeSnapshots(image, [snapshot], run).catch(error => {
      // Somebody has clones on it, or the pool is gone with it: no reasons to stop this instance's backups.
      if (!isVarveError(error, 'RBD_SNAPSHOT_PROTECTED') && !isVarveError(error, 'CEPH_POOL_NOT_FOUND'))
        throw error
      emit(run, {
        type: 'warning',
        message: `The snapshot ${snapshot} of ${image} is not removed: ${error.message}`,
      })
    })
  }
}

/** What tells that a manifest which was written makes no backup. */
const NOT_PUBLISHED: ReadonlySet<ErrorCode> = new Set(['DIGEST_MISMATCH', 'SIZE_MISMATCH', 'PARENT_MISSING'])

async function isPublished(
  { header }: RunJournal,
  storage: StorageDriver | undefined,
  publish: JournalStepOf<'publish'>,
): Promise<boolean> {
  const { manifest } = publish
  if (!storage) {
    throw new VarveError(
      'RUN_UNRESOLVED',
      `Whether the backup ${header.id} was published cannot be told without its storage (${header.storage.type}, ${header.storage.location}). The instance is back on its disks. Run "varve recover" with that storage configured.`,
      {
        context: { manifest, storage: header.storage.location },
      },
    )
  }
  try {
    await assertPublished(storage, publish, AbortSignal.timeout(STORAGE_TIMEOUT_MS))
    return true
  } catch (error) {
    if (isVarveError(error) && NOT_PUBLISHED.has(error.code)) return false
    throw new VarveError(
      'RUN_UNRESOLVED',
      `Whether the backup was published cannot be told, as the storage does not answer: ${errorMessage(error)} The instance is back on its disks. Run "varve recover" once the storage is there.`,
      {
        context: { manifest, storage: storage.location },
        cause: error,
        retryable: true,
      },
    )
  }
}

/** The objects are no backup: what cannot be removed now is left to `prune`, which knows such folders. */
async function removeObjects(
  storage: StorageDriver | undefined,
  folder: string,
  run: RunOptions,
): Promise<void> {
  if (!storage)
    return emit(run, {
      type: 'warning',
      message: `Unfinished objects may stay under ${folder} until the next prune of their storage.`,
    })
  const signal = AbortSignal.timeout(STORAGE_TIMEOUT_MS)
  try {
    await removeFolder(storage, folder, signal)
  } catch (error) {
    emit(run, {
      type: 'warning',
      message: `Unfinished objects stay under ${folder} until the next prune: ${errorMessage(error)}`,
    })
  }
}

/** The error of a run whose clean-up failed too: the host needs someone to look at it. */
export function settleError(error: unknown, failure: unknown, published: string | undefined): VarveError {
  const code = isVarveError(error) ? error.code : 'RUN_UNRESOLVED'
  const context = { ...(isVarveError(error) && error.context), ...(published !== undefined && { published }) }
  const done =
    published === undefined ? 'It was being undone' : `The backup ${published} is complete, and this came`
  const before = failure === undefined ? '' : ` ${done} after: ${errorMessage(failure)}`
  return new VarveError(code, `${errorMessage(error)}${before}`, {
    context,
    cause: failure === undefined ? error : new AggregateError([error, failure]),
    retryable: isVarveError(error) && error.retryable,
  })
}
