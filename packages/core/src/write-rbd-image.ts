import { markName, restoredKey, snapshotObstacle } from './backup-plan.ts'
import type { TargetImage } from './journal.ts'
import { type RestoreContext, stage } from './restore-context.ts'
import type { RestoredDisk } from './restore-pipeline.ts'
import type { RbdRestore } from './restore-plan-rbd.ts'
import type { RunOptions } from './run-options.ts'
import { writeExport } from './write-export.ts'

/** Writes a new RBD image, or over the one that is there. */
export async function writeRbdImage(restore: RestoreContext, disk: RbdRestore): Promise<RestoredDisk> {
  const { journal, run } = restore
  const { cluster, image, existing, temporary } = disk
  const { name, virtualSize: size } = disk.disk
  let base: string | undefined
  if (temporary === undefined) {
    await journal.record({ step: 'write-in-place', disk: name, path: disk.target })
    base = await rollBack(restore, disk)
  } else {
    await journal.record({ step: 'image-create', ...targetImage(restore, disk, temporary) })
    await cluster.createImage(temporary, { size, ...(existing && { like: existing.image }) }, run)
  }
  return writeExport(restore, disk, {
    open: folder => cluster.fileName(temporary ?? image, folder),
    format: 'raw',
    isNew: temporary !== undefined,
    ...(base && { base }),
  })
}

/**
 * Brings an image back to the newest snapshot that it still has of the chain, and returns that backup's id: only what
 * is newer has to be downloaded. Not where the size differs, which a rollback changes too.
 */
async function rollBack({ chain, run }: RestoreContext, disk: RbdRestore): Promise<string | undefined> {
  const { cluster, image, existing } = disk
  if (!existing) return undefined
  for (const { manifest } of chain.toReversed()) {
    const stored = manifest.disks.find(({ name }) => name === disk.disk.name)
    if (!stored || stored.virtualSize !== existing.virtualSize) continue
    if (snapshotObstacle(existing, stored, manifest.id) !== undefined) continue
    const snapshot = markName(manifest.id)
    stage(run, 'write', `Rolling ${disk.target} back to its snapshot ${snapshot}`)
    await cluster.rollback(image, snapshot, run)
    return manifest.id
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
  const snapshot = await cluster.createSnapshot(temporary ?? image, name, run)
  await cluster.setMetadata(temporary ?? image, restoredKey(backupId, disk.name), String(snapshot.id), run)
}
