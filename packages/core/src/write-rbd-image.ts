import { markName, restoredKey, snapshotObstacle } from './backup-plan.ts'
import { incompleteKey, incompleteMarks } from './incomplete-mark.ts'
import type { TargetImage } from './journal.ts'
import { imageSize } from './manifest.ts'
import { exportDisk } from './qemu-nbd.ts'
import { madeSnapshot } from './rbd-disk.ts'
import { type RestoreContext, stage } from './restore-context.ts'
import type { RestoredDisk } from './restore-pipeline.ts'
import type { RbdRestore } from './restore-plan-rbd.ts'
import type { RunOptions } from './run-options.ts'
import { writeExport } from './write-export.ts'

/** Writes a new RBD image, or over the one that is there. */
export async function writeRbdImage(restore: RestoreContext, disk: RbdRestore): Promise<RestoredDisk> {
  const { journal, run } = restore
  const { cluster, existing, temporary } = disk
  if (temporary === undefined) return writeOver(restore, disk)
  const size = disk.disk.format === 'qcow2' ? imageSize(disk.disk) : disk.disk.virtualSize
  await journal.record({ step: 'image-create', ...targetImage(restore, disk, temporary) })
  await cluster.createImage(temporary, { size, ...(existing && { like: existing.image }) }, run)
  const open = (folder: string) => cluster.fileName(temporary, folder)
  return writeExport(restore, disk, { open, format: 'raw', isNew: true })
}

/** Brings the image back to the newest snapshot that it still has of the chain: only what is newer is downloaded. */
async function writeOver(restore: RestoreContext, disk: RbdRestore): Promise<RestoredDisk> {
  const { journal, run } = restore
  const { cluster, image, existing } = disk
  const { of } = targetImage(restore, disk, image)
  const overwritten = {
    disk: disk.disk.name,
    path: disk.target,
    ...(existing && { identity: existing.state.id }),
    ...(of && { of }),
  }
  const begin = async () => {
    const mark = incompleteKey(journal.header.id)
    const former = existing ? incompleteMarks(existing) : []
    await journal.record({ step: 'mark-incomplete', ...overwritten, mark, former })
    await cluster.setMetadata(image, mark, disk.disk.name, run)
    await journal.record({ step: 'write-in-place', ...overwritten })
  }
  const base = newestSnapshot(restore, disk)
  const open = async (folder: string) => {
    const name = await cluster.fileName(image, folder)
    if (base !== undefined) {
      // Where QEMU cannot serve it, it keeps what it holds.
      const served = { disk: disk.disk.name, path: name, format: 'raw', writable: true, folder } as const
      await (await exportDisk({ ...run, ...served })).stop()
      const snapshot = markName(base)
      stage(run, 'write', `Rolling ${disk.target} back to its snapshot ${snapshot}`)
      await begin()
      await cluster.rollback(image, snapshot, run) // while nobody has it open
    }
    return name
  }
  const how = base === undefined ? { beforeWrite: begin } : { base }
  return writeExport(restore, disk, { open, format: 'raw', ...how })
}

/**
 * The newest backup of the chain whose snapshot an image still has. None where the size differs, which a rollback
 * changes too.
 */
function newestSnapshot({ chain }: RestoreContext, { disk, existing }: RbdRestore): string | undefined {
  if (!existing) return undefined
  for (const { manifest } of chain.toReversed()) {
    const stored = manifest.disks.find(({ name }) => name === disk.name)
    if (!stored || stored.virtualSize !== existing.virtualSize) continue
    if (snapshotObstacle(existing, stored, manifest.id) === undefined) return manifest.id
  }
  return undefined
}

/** What the journal knows an image by. */
export function targetImage({ plan }: RestoreContext, { disk, of }: RbdRestore, image: string): TargetImage {
  const inClusterOf = of ?? (plan.instance && { instance: plan.instance.name, disk: disk.name })
  return { image, ...(inClusterOf && { of: inClusterOf }) }
}

/**
 * A snapshot of the restored content, and in the image's metadata which one it is: the manifest has the number of
 * the snapshot that was backed up. Where that one is still there its content is the restored one.
 */
export async function markImage(
  { disk, cluster, image, existing, temporary }: RbdRestore,
  backupId: string,
  run: RunOptions,
): Promise<void> {
  const name = markName(backupId)
  if (temporary === undefined && existing?.state.snapshots.some(snapshot => snapshot.name === name)) return
  const marked = temporary ?? image
  await cluster.createSnapshot(marked, name, run)
  const { id } = await madeSnapshot(cluster, marked, name, run)
  await cluster.setMetadata(marked, restoredKey(backupId, disk.name), String(id), run)
}
