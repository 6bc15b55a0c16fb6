import { mkdir } from 'node:fs/promises'
import { NbdClient } from '@varve/nbd'
import type { LayeredExtents } from '@varve/qcow2'
import { NbdTarget } from './nbd-target.ts'
import { exportDisk, newExportFolder } from './qemu-nbd.ts'
import type { RestoreContext } from './restore-context.ts'
import type { RestoredDisk } from './restore-pipeline.ts'
import type { DiskRestore } from './restore-plan.ts'
import { writeTarget } from './write-target.ts'

/** Writes to what QEMU opens, through a `qemu-nbd` of its own. */
export async function writeExport(
  restore: RestoreContext,
  disk: DiskRestore,
  to: {
    readonly path: string
    readonly format: 'qcow2' | 'raw'
    readonly isNew?: boolean
    readonly base?: string
  },
): Promise<RestoredDisk> {
  const { journal, run } = restore
  const folder = newExportFolder()
  await journal.record({ step: 'export', folder })
  await mkdir(folder, { mode: 0o700 })
  const { path, format, isNew = false, base } = to
  await using server = await exportDisk({
    ...run,
    disk: disk.disk.name,
    path,
    format,
    writable: true,
    folder,
  })
  const signal = run.signal ? AbortSignal.any([run.signal, server.died]) : server.died
  await using client = await NbdClient.connect({ socketPath: server.socketPath }, { signal })
  try {
    const createTarget = (merged: LayeredExtents) =>
      Promise.resolve(new NbdTarget(client, merged, { path: disk.target, isNew }))
    return await writeTarget({ ...restore, run: { ...run, signal } }, disk, createTarget, base)
  } catch (error) {
    throw server.died.aborted && !run.signal?.aborted ? server.died.reason : error
  }
}
