import { rm } from 'node:fs/promises'
import { NbdClient } from '@varve/nbd'
import type { LayeredExtents } from '@varve/qcow2'
import { NbdTarget } from './nbd-target.ts'
import { exportDisk, makeExportFolder, type NbdExport, newExportFolder } from './qemu-nbd.ts'
import type { RestoreContext } from './restore-context.ts'
import type { RestoredDisk } from './restore-pipeline.ts'
import type { DiskRestore } from './restore-plan.ts'
import { targetError } from './restore-target.ts'
import { writeTarget } from './write-target.ts'

/** What {@link writeExport} writes to. */
interface ExportTarget {
  /** The name that QEMU opens. What belongs to it may be put in the folder, which is private and goes in the end. */
  readonly open: (folder: string) => Promise<string>
  readonly format: 'qcow2' | 'raw'
  /** Awaited right before the first write. */
  readonly beforeWrite?: (() => Promise<void>) | undefined
  /** Whether it reads as zeros now. Default: false. */
  readonly isNew?: boolean
  /** The backup of the chain whose content it has once it is opened. Default: none. */
  readonly base?: string
}

/** Writes to what QEMU opens, through a `qemu-nbd` of its own. All layers have been opened before. */
export async function writeExport(
  restore: RestoreContext,
  disk: DiskRestore,
  to: ExportTarget,
): Promise<RestoredDisk> {
  const folder = newExportFolder()
  await restore.journal.record({ step: 'export', folder })
  await makeExportFolder(folder)
  try {
    return await writeServed(restore, disk, to, folder)
  } finally {
    await rm(folder, { recursive: true, force: true })
  }
}

async function writeServed(
  restore: RestoreContext,
  disk: DiskRestore,
  { open, format, beforeWrite, isNew = false, base }: ExportTarget,
  folder: string,
): Promise<RestoredDisk> {
  const died = new AbortController()
  const signal = restore.run.signal ? AbortSignal.any([restore.run.signal, died.signal]) : died.signal
  const run = { ...restore.run, signal }
  const opened: { server?: NbdExport; client?: NbdClient } = {}
  const createTarget = async (merged: LayeredExtents) => {
    const path = await open(folder)
    const server = await exportDisk({ ...run, disk: disk.disk.name, path, format, writable: true, folder })
    opened.server = server
    server.died.addEventListener('abort', () => died.abort(server.died.reason))
    opened.client = await NbdClient.connect({ socketPath: server.socketPath }, { signal }).catch(error => {
      throw targetError(error, disk.target)
    })
    const target = new NbdTarget(opened.client, merged, { path: disk.target, isNew })
    await beforeWrite?.()
    return target
  }
  try {
    return await writeTarget({ ...restore, run }, disk, createTarget, base)
  } catch (error) {
    const isServer = opened.server?.died.aborted && !restore.run.signal?.aborted
    throw isServer ? opened.server?.died.reason : error
  } finally {
    await opened.client?.close()
    await opened.server?.stop()
  }
}
