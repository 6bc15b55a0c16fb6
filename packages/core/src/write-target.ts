import type { LayeredExtents } from '@varve/qcow2'
import { Progress } from './progress.ts'
import type { RestoreContext } from './restore-context.ts'
import { restoreDisk } from './restore-disk.ts'
import type { RestoredDisk } from './restore-pipeline.ts'
import type { DiskRestore } from './restore-plan.ts'
import type { RestoreTarget } from './restore-target.ts'

/** Writes one disk of the chain to a target; with `base`, only what is newer than that backup. */
export async function writeTarget(
  { storage, chain, run }: RestoreContext,
  { disk, format, target }: DiskRestore,
  createTarget: (merged: LayeredExtents) => Promise<RestoreTarget>,
  base?: string,
): Promise<RestoredDisk> {
  let progress: Progress | undefined
  let bytesWritten = 0
  await restoreDisk({
    storage,
    chain,
    disk: disk.name,
    createTarget,
    ...(base !== undefined && { base }),
    ...(run.signal && { signal: run.signal }),
    onProgress: (bytesDone, bytesTotal) => {
      progress ??= new Progress(run, disk.name, bytesTotal)
      progress.update(bytesDone)
      bytesWritten = bytesTotal
    },
  })
  progress?.finish()
  return { name: disk.name, path: target, format, virtualSize: disk.virtualSize, bytesWritten }
}
