import { stat } from 'node:fs/promises'
import type { LayeredExtents } from '@varve/qcow2'
import { fileIdentity } from './bitmap-twin.ts'
import { imageMarks, incompleteMark, markImageIncomplete } from './incomplete-mark.ts'
import { folderIdentity } from './presence.ts'
import { Qcow2FileTarget } from './qcow2-file-target.ts'
import { RawFileTarget } from './raw-file-target.ts'
import { type RestoreContext, recordTarget, stage } from './restore-context.ts'
import type { RestoredDisk } from './restore-pipeline.ts'
import type { FileRestore } from './restore-plan.ts'
import { assertImageUnused } from './restore-plan-rbd.ts'
import type { RestoreTarget } from './restore-target.ts'
import { takeOwnership } from './take-ownership.ts'
import { writeExport } from './write-export.ts'
import { writeRbdImage } from './write-rbd-image.ts'
import { writeTarget } from './write-target.ts'

/** Writes every disk, one after the other: each uses the whole of the storage's rate. */
export async function writeTargets(restore: RestoreContext): Promise<RestoredDisk[]> {
  const { plan, journal, request, run } = restore
  const restored: RestoredDisk[] = []
  if (request.inPlace) await assertImagesUnused(restore)
  for (const disk of plan.disks) {
    stage(run, 'write', `Restoring ${disk.disk.name} to ${disk.target}`)
    if (disk.format === 'rbd') restored.push(await writeRbdImage(restore, disk))
    else if (disk.temporary !== undefined) {
      const { temporary } = disk
      await recordTarget(journal, temporary)
      restored.push(await writeTarget(restore, disk, merged => newFile(disk, temporary, merged)))
    } else restored.push(await writeInPlace(restore, disk))
  }
  if (request.inPlace) {
    await assertImagesUnused(restore) // what was opened meanwhile may have been written to by others
    await journal.record({ step: 'written-in-place' })
  }
  return restored
}

/**
 * An RBD image that others have open, such as a virtual machine of another host, can be written to all the same: its
 * lock goes from one client to the other.
 *
 * @throws DISK_BUSY
 */
async function assertImagesUnused({ plan, run }: RestoreContext): Promise<void> {
  for (const disk of plan.disks) {
    if (disk.format === 'rbd') await assertImageUnused(disk.cluster, disk.image, run)
  }
}

/** A file that belongs to whom the old one does: whether it can is known before hours of writing. */
async function newFile(disk: FileRestore, path: string, merged: LayeredExtents): Promise<RestoreTarget> {
  const file = await createFile(disk, path, merged)
  try {
    await takeOwnership(path, disk.target)
    return file
  } catch (error) {
    await file.abort()
    throw error
  }
}

function createFile(disk: FileRestore, path: string, merged: LayeredExtents): Promise<RestoreTarget> {
  if (disk.format === 'raw') return RawFileTarget.create({ path }, merged)
  const clusterSize = disk.disk.format === 'qcow2' ? { clusterSize: disk.disk.clusterSize } : {}
  return Qcow2FileTarget.create({ path, ...clusterSize }, merged)
}

async function writeInPlace(
  { journal, ...restore }: RestoreContext,
  disk: FileRestore,
): Promise<RestoredDisk> {
  const { format, target: path, holdsBitmaps } = disk
  const overwritten = async () => {
    const identity = await fileIdentity(path)
    const folder = (await stat(path)).isFile() ? { folder: await folderIdentity(path) } : {}
    return { disk: disk.disk.name, path, identity, ...folder }
  }
  // Before a server has it open, which lets nobody else add a bitmap.
  const open = async () => {
    if (!holdsBitmaps) return path
    const mark = incompleteMark(journal.header.id)
    const former = await imageMarks(path, restore.run)
    await journal.record({ step: 'mark-incomplete', ...(await overwritten()), mark, former })
    await markImageIncomplete(path, mark, restore.run)
    return path
  }
  const beforeWrite = async () => journal.record({ step: 'write-in-place', ...(await overwritten()) })
  return writeExport({ journal, ...restore }, disk, { open, format, beforeWrite })
}
