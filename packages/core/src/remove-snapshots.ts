import { markName } from './backup-plan.ts'
import { DiskLock } from './disk-lock.ts'
import { errorMessage } from './errors.ts'
import type { Host } from './host.ts'
import type { BackupManifest } from './manifest.ts'
import { RBD_PREFIX } from './rbd.ts'
import { emit, type RunOptions } from './run-options.ts'

/**
 * Removes the snapshots of a backup that was deleted from its RBD images. It is not what a deletion fails by: the next
 * backup to the same storage removes those that stay.
 */
export async function removeSnapshotsOf(
  { id, instance, definition, disks }: BackupManifest,
  host: Host,
  run: RunOptions,
): Promise<void> {
  for (const { name: disk, source } of disks) {
    if (source.format !== 'rbd') continue
    const image = source.path
    const remove = async (): Promise<void> => {
      // An increment that is being exported since this snapshot must not lose it on the way.
      await using _lock = await DiskLock.acquire([`${RBD_PREFIX}${image}`])
      // Without a definition it was backed up by its name alone.
      const cluster = await host.rbd(definition && { instance: instance.name, disk }, run)
      await cluster.removeSnapshots(image, [markName(id)], run)
    }
    try {
      await remove()
    } catch (error) {
      if (run.signal?.aborted) throw error
      const message = `The backup ${id} is deleted, but its snapshot ${markName(id)} of the RBD image ${image} stays until the next backup to the same storage: ${errorMessage(error)}`
      emit(run, { type: 'warning', message })
    }
  }
}
