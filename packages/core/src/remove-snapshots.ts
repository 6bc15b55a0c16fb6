import { markName } from './backup-plan.ts'
import { DiskLock } from './disk-lock.ts'
import { errorMessage } from './errors.ts'
import type { Host } from './host.ts'
import type { StorageReference } from './journal.ts'
import type { BackupManifest } from './manifest.ts'
import { MarkLedger } from './mark-ledger.ts'
import { RBD_PREFIX } from './rbd.ts'
import { isImageGone } from './rbd-disk.ts'
import { emit, type RunOptions } from './run-options.ts'
import { isSameStorage } from './same-storage.ts'

/** What {@link removeSnapshotsOf} works with. */
export interface RemoveSnapshotsOptions {
  readonly host: Host
  /** The state folder of the pipelines, with their ledger. */
  readonly stateDir: string
  /** The storage that the backup was deleted from. */
  readonly storage: StorageReference
}

/**
 * Removes the snapshots of a backup that was deleted from its RBD images. It is not what a deletion fails by: the next
 * backup to the same storage removes those that stay.
 *
 * Whose a snapshot is, the ledger tells and not the manifest: whoever can write to one storage could else have the
 * snapshot removed that the chain on another one needs, by a backup with its id. What did not go from here to this
 * storage stays, with a warning.
 */
export async function removeSnapshotsOf(
  { id, instance, definition, disks }: BackupManifest,
  { host, stateDir, storage }: RemoveSnapshotsOptions,
  run: RunOptions,
): Promise<void> {
  const snapshot = markName(id)
  for (const { name: disk, source } of disks) {
    if (source.format !== 'rbd') continue
    const image = source.path
    const warn = (why: string): void =>
      emit(run, {
        type: 'warning',
        message: `The backup ${id} is deleted, but its snapshot ${snapshot} of the RBD image ${image} stays${why}`,
      })
    const remove = async (): Promise<void> => {
      const went = await new MarkLedger(stateDir, instance.name).storageOf(id)
      // Without a definition it was backed up by its name alone.
      const cluster = await host.rbd(definition && { instance: instance.name, disk }, run)
      if (went && isSameStorage(went, storage)) {
        // An increment that is being exported since this snapshot must not lose it on the way.
        await using _lock = await DiskLock.acquire([`${RBD_PREFIX}${image}`])
        await cluster.removeSnapshots(image, [snapshot], run)
      } else if ((await cluster.snapshots(image, run)).some(({ name }) => name === snapshot)) {
        warn(
          went
            ? `: by the records of this machine, that backup went to ${went.location}.`
            : `, as nothing in ${stateDir} tells that it went from here to ${storage.location}. If no other storage has that backup, remove it: rbd snap rm ${image}@${snapshot}`,
        )
      }
    }
    try {
      await remove()
    } catch (error) {
      if (run.signal?.aborted) throw error
      if (isImageGone(error)) continue // the image took its snapshots along
      warn(` until the next backup to the same storage: ${errorMessage(error)}`)
    }
  }
}
