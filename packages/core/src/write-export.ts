import { mkdir, rm } from 'node:fs/promises'
import { NbdClient } from '@varve/nbd'
import type { LayeredExtents } from '@varve/qcow2'
import { NbdTarget } from './nbd-target.ts'
import { exportDisk, newExportFolder } from './qemu-nbd.ts'
import type { RestoreContext } from './restore-context.ts'
import type { RestoredDisk } from './restore-pipeline.ts'
import type { DiskRestore } from './restore-plan.ts'
import { writeTarget } from './write-target.ts'

/** What {@link writeExport} writes to. */
interface ExportTarget {
  /** The name that QEMU opens. What belongs to it may be put in the folder, which is private and goes in the end. */
  readonly open: (folder: string) => Promise<string>
  readonly format: 'qcow2' | 'raw'
  /** Whether it reads as zeros now. Default: false. */
  readonly isNew?: boolean
  /** The backup of the chain whose content it has. Default: none. */
  readonly base?: string
}

/** Writes to what QEMU opens, through a `qemu-nbd` of its own. */
export async function writeExport(
  restore: RestoreContext,
  disk: DiskRestore,
  to: ExportTarget,
): Promise<RestoredDisk> {
  const folder = newExportFolder()
  await restore.journal.record({ step: 'export', folder })
  await mkdir(folder, { mode: 0o700 })
  try {
    return await writeServed(restore, disk, to, folder)
  } finally {
    await rm(folder, { recursive: true, force: true })
  }
}

async function writeServed(
  restore: RestoreContext,
  disk: DiskRestore,
  { open, format, isNew = false, base }: ExportTarget,
  folder: string,
): Promise<RestoredDisk> {
  const { run } = restore
  const path = await open(folder)
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
