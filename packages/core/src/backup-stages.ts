import { readFile, stat } from 'node:fs/promises'
import PQueue from 'p-queue'
import { type BackupContext, stage } from './backup-context.ts'
import { type BackupPlan, BITMAP_GRANULARITY, markName } from './backup-plan.ts'
import { fileIdentity } from './bitmap-twin.ts'
import { diskError } from './disk-error.ts'
import { diskDefinition } from './domain-xml.ts'
import { abortError, errorMessage, isVarveError, VarveError } from './errors.ts'
import { fileState } from './file-state.ts'
import { unlessAborted } from './giving-up.ts'
import {
  type DiskOverlay,
  type FileDisk,
  type Host,
  type HostDisk,
  type Instance,
  isFileDisk,
  type RbdDisk,
} from './host.ts'
import type { FrozenBase } from './journal.ts'
import type { Consistency, ManifestDisk } from './manifest.ts'
import { lackOfSpace, type SizedOverlay } from './overlay-space.ts'
import { folderIdentity } from './presence.ts'
import { resolveDisk } from './qemu-img.ts'
import { makeExportFolder, newExportFolder } from './qemu-nbd.ts'
import { RateLimit } from './rate-limit.ts'
import type { RbdSnapshot } from './rbd.ts'
import { madeSnapshot } from './rbd-disk.ts'
import { emit, type RunOptions } from './run-options.ts'
import { type ServedDisk, serveDisk, streamFileDisk } from './stream-file-disk.ts'
import { streamRbdDisk } from './stream-rbd-disk.ts'

function fileDisks({ disks }: BackupPlan): FileDisk[] {
  return disks.map(({ disk }) => disk).filter(isFileDisk)
}

/**
 * Where a running instance is to write to while the backup of this id is taken.
 *
 * @throws INVALID_ARGUMENT where there is no such folder
 */
export async function planOverlays(
  host: Host,
  { running, definition: whole = '' }: Instance,
  disks: readonly HostDisk[],
  id: string,
): Promise<SizedOverlay[]> {
  if (!running) return []
  return Promise.all(
    disks.filter(isFileDisk).map(async disk => {
      const definition = whole === '' ? undefined : diskDefinition(whole, disk.name)
      const overlay = await host.overlayPath(disk, id)
      return {
        disk: disk.name,
        base: disk.path,
        baseFormat: disk.format,
        overlay,
        folder: await folderIdentity(overlay),
        virtualSize: disk.virtualSize,
        ...(definition !== undefined && { definition }),
        ...(disk.blockDevice && { device: await fileIdentity(disk.path) }),
      }
    }),
  )
}

/** Begins a bitmap of this backup's on every qcow2 disk, before the freeze: no write falls between the two. */
export async function mark({ id, host, instance, plan, journal, run }: BackupContext): Promise<void> {
  const disks = fileDisks(plan).filter(({ holdsBitmaps }) => holdsBitmaps)
  if (disks.length === 0) return
  const bitmap = markName(id)
  stage(run, 'mark', `Adding the bitmap ${bitmap}`)
  await journal.record({ step: 'bitmap-add', bitmap, disks: disks.map(({ name }) => name) })
  await host.addBitmap(instance.name, disks, bitmap, BITMAP_GRANULARITY, run)
}

/** The moment that a backup shows. */
export interface Frozen {
  readonly at: Date
  readonly consistency: Consistency
  /** Where a running instance writes to until the backup is done. */
  readonly overlays: readonly SizedOverlay[]
  /** The snapshots of RBD images, by the name of their disk. */
  readonly snapshots: ReadonlyMap<string, RbdSnapshot>
  /** Of an instance that is off: what shows a write to its files since then; see {@link fileStates}. */
  readonly files: ReadonlyMap<string, string>
  /** The UEFI variables at that moment. */
  readonly nvram?: Buffer
}

/** Freezes the disks of a running instance at one moment; those of a stopped one are still anyway. */
export async function freeze(backup: BackupContext): Promise<Frozen> {
  const { instance, plan, run } = backup
  const images = plan.disks.map(({ disk }) => disk).filter(disk => !isFileDisk(disk))
  if (instance.running || images.length > 0) {
    const count = plan.disks.length === 1 ? 'one disk' : `${plan.disks.length} disks`
    stage(run, 'freeze', `Freezing ${count} by a snapshot`)
  }
  const moment = instance.running ? await freezeRunning(backup, images) : await freezeStopped(backup, images)
  const nvram = instance.nvram === undefined ? undefined : await readNvram(instance.nvram, run)
  return { ...moment, ...(nvram && { nvram }) }
}

/** An instance whose memory was saved has not shut down: without that memory its disks are as after a power cut. */
async function freezeStopped(backup: BackupContext, images: readonly RbdDisk[]): Promise<Frozen> {
  const { host, instance, run } = backup
  const saved = await host.hasSavedMemory(instance.name, run)
  if (saved) {
    emit(run, {
      type: 'warning',
      message: `${instance.name} is off with its memory saved (virsh managedsave), which is not in the backup: the backup is crash-consistent.`,
    })
  }
  const files = await fileStates(backup)
  const isOpen = await admitOpenImages(backup, images)
  await snapshotImages(backup, images)
  // Again: it may have been started in between.
  const consistency = saved || isOpen || (await admitOpenImages(backup, images)) ? 'crash' : 'offline'
  const snapshots = await snapshotsOf(backup, images)
  return { at: new Date(), consistency, overlays: [], snapshots, files }
}

/**
 * Whether a client has one of the images open although their instance does not run here, with a warning that the backup
 * is crash-consistent.
 *
 * @throws DISK_BUSY where there are other disks, which nothing freezes at the same moment
 */
async function admitOpenImages(
  { instance, plan, run }: BackupContext,
  images: readonly RbdDisk[],
): Promise<boolean> {
  const looks = images.map(async ({ image, cluster }) => ((await cluster.isOpen(image, run)) ? [image] : []))
  const open = (await Promise.all(looks)).flat()
  if (open.length === 0) return false
  const where = `${open.join(' and ')} of ${instance.name} ${open.length > 1 ? 'are' : 'is'} open in another program, or in a virtual machine of another host ("rbd status" shows where)`
  if (plan.disks.length > 1) {
    throw new VarveError(
      'DISK_BUSY',
      `${where}. Several disks are frozen at one moment only where their instance runs under this libvirt: back it up there, or each disk on its own, or when nothing has them open. A client that died counts for 30 s more.`,
      { context: { instance: instance.name, images: open }, retryable: true },
    )
  }
  emit(run, { type: 'warning', message: `${where}: the backup is crash-consistent.` })
  return true
}

async function freezeRunning(backup: BackupContext, images: readonly RbdDisk[]): Promise<Frozen> {
  const { host, instance, overlays, journal, lock, run, request } = backup
  const lack = await lackOfSpace(overlays, request.overlayReserve)
  if (lack) throw lack
  const frozen = request.freeze !== undefined && request.freeze !== 'off' && (await freezeFilesystems(backup))
  let at: Date
  try {
    await atOneMoment(backup, { images, overlays }, async () => {
      if (overlays.length > 0) {
        // By these a second run finds the disks from here on.
        await lock.add(overlays.map(({ overlay }) => overlay))
        await journal.record({ step: 'snapshot', overlays })
        await host.snapshot(instance.name, overlays, run)
      }
      await snapshotImages(backup, images)
    })
    at = new Date()
  } finally {
    if (frozen) await thaw(backup)
  }
  const snapshots = await snapshotsOf(backup, images) // no guest stands still while they are asked for
  return { at, consistency: frozen ? 'filesystem' : 'crash', overlays, snapshots, files: new Map() }
}

/** After the snapshot: QEMU writes its bitmaps into the file which it freezes. */
export async function recordBases({ journal, run }: BackupContext, { overlays }: Frozen): Promise<void> {
  if (overlays.length === 0) return
  // It may take as long as the file system has dirty pages, or its server is away, and the guest writes to overlays meanwhile.
  const bases = await unlessAborted(frozenBases(overlays, run), run.signal)
  await journal.record({ step: 'frozen', bases })
}

/** One after the other: each may hold one of the four threads that Node does all work on files with. */
async function frozenBases(overlays: readonly DiskOverlay[], { signal }: RunOptions): Promise<FrozenBase[]> {
  const bases: FrozenBase[] = []
  for (const { base, overlay } of overlays) {
    if (signal?.aborted) throw abortError(signal)
    const state = await fileState(base)
    if (state) bases.push({ overlay, ...state })
  }
  return bases
}

/**
 * libvirt freezes all files at one moment, but RBD images one after the other. Where there are several disks and one
 * is an image, the guest's processors stand still meanwhile, also where the agent has frozen its file systems: a program
 * may write to a disk without one.
 */
async function atOneMoment(
  backup: BackupContext,
  { images, overlays }: { images: readonly RbdDisk[]; overlays: readonly DiskOverlay[] },
  work: () => Promise<void>,
): Promise<void> {
  if (images.length === 0 || images.length + overlays.length < 2) return work()
  const { host, instance, journal, run } = backup
  if (instance.paused) return whilePaused(backup, work)
  const events = run.onEvent ? { onEvent: run.onEvent } : {}
  await journal.record({ step: 'suspend' })
  let ours = true
  try {
    ours = await host.suspend(instance.name, run)
    await whilePaused(backup, work)
  } finally {
    if (ours) await host.resume(instance.name, events) // without the signal: also after an abort
    await journal.record({ step: 'resumed' })
  }
}

/** @throws SNAPSHOT_FAILED where somebody resumed the guest meanwhile: what it wrote then is on some of the disks only */
async function whilePaused({ host, instance, run }: BackupContext, work: () => Promise<void>): Promise<void> {
  await work()
  if (await host.isPaused(instance.name, run)) return
  throw new VarveError(
    'SNAPSHOT_FAILED',
    `${instance.name} was resumed by somebody while its disks were frozen one after the other, so they do not show one moment. Nothing was published; back up again.`,
    { context: { instance: instance.name }, retryable: true },
  )
}

/** Takes a snapshot of every RBD image. */
async function snapshotImages(
  { id, journal, run }: BackupContext,
  images: readonly RbdDisk[],
): Promise<void> {
  if (images.length === 0) return
  const snapshot = markName(id)
  const disks = images.map(({ name, image }) => ({ disk: name, image }))
  await journal.record({ step: 'rbd-snapshot', snapshot, disks })
  const taken = await Promise.allSettled(
    images.map(({ image, cluster }) => cluster.createSnapshot(image, snapshot, run)),
  )
  const failed = taken.find(outcome => outcome.status === 'rejected')
  if (failed) throw failed.reason
  for (const { image, state } of images) {
    if (!state.objectMapInvalid) continue
    const message = `Ceph has found the object map of ${image} to be wrong and goes without it: the backup is right, but slower than need be. Rebuild it: rbd object-map rebuild ${image}`
    emit(run, { type: 'warning', message })
  }
}

/** The snapshots that were taken, by the name of their disk. */
async function snapshotsOf(
  { id, run }: BackupContext,
  images: readonly RbdDisk[],
): Promise<ReadonlyMap<string, RbdSnapshot>> {
  const made = images.map(async ({ name, image, cluster }) => {
    return [name, await madeSnapshot(cluster, image, markName(id), run)] as const
  })
  return new Map(await Promise.all(made))
}

async function freezeFilesystems(backup: BackupContext): Promise<boolean> {
  const { host, instance, journal, run, request } = backup
  await journal.record({ step: 'filesystem-freeze' })
  try {
    await host.freezeFilesystems(instance.name, run)
    return true
  } catch (error) {
    const unreached = isVarveError(error, 'FREEZE_FAILED') && error.context.agent === false
    if (unreached) await journal.record({ step: 'filesystem-thawed' })
    else await thaw(backup) // it may have frozen some file systems before it failed
    if (request.freeze !== 'try' || !isVarveError(error, 'FREEZE_FAILED')) throw error
    emit(run, { type: 'warning', message: `${error.message} The backup is crash-consistent.` })
    return false
  }
}

async function thaw({ host, instance, journal, run: { onEvent } }: BackupContext): Promise<void> {
  await host.thawFilesystems(instance.name, onEvent ? { onEvent } : {}) // without the signal: also after an abort
  await journal.record({ step: 'filesystem-thawed' })
}

/**
 * What shows that somebody wrote to the disks of an instance that is off: it was started and stopped again before
 * `qemu-nbd` kept others from them, or a program does not ask QEMU's locks, such as `dd`. A block device shows nothing.
 */
async function fileStates({ plan }: BackupContext): Promise<ReadonlyMap<string, string>> {
  const states = new Map<string, string>()
  for (const { name, path, blockDevice } of fileDisks(plan)) {
    if (blockDevice) continue
    const { dev, ino, size, mtimeNs } = await stat(await resolveDisk(name, path), { bigint: true })
    states.set(name, [dev, ino, size, mtimeNs].join(' '))
  }
  return states
}

/** @throws DISK_BUSY */
async function assertNotWritten(backup: BackupContext, { files }: Frozen): Promise<void> {
  if (files.size === 0) return
  for (const [disk, state] of await fileStates(backup)) {
    if (state === files.get(disk)) continue
    throw new VarveError(
      'DISK_BUSY',
      `The disk ${disk} was written to while it was backed up as that of an instance that is off. Nothing was published; back up again while it stays off, or as a running libvirt domain.`,
      { context: { disk }, retryable: true },
    )
  }
}

/**
 * Streams the image of every disk to the storage, several at once; the first failure ends the others. Those that are
 * files are all served before one is read: nothing of QEMU's can write to those of an instance that is off from here on,
 * so that they show one moment.
 */
export async function stream(backup: BackupContext, frozen: Frozen): Promise<ManifestDisk[]> {
  const served = new Map<string, ServedDisk>()
  try {
    await serveDisks(backup, served)
    await assertNotWritten(backup, frozen)
    const images = await streamDisks(backup, frozen, served)
    await assertNotWritten(backup, frozen)
    return images
  } finally {
    await Promise.all([...served.values()].map(disk => disk[Symbol.asyncDispose]()))
  }
}

/** Serves each disk that is a file, and adds it to `served` by its name. */
async function serveDisks(backup: BackupContext, served: Map<string, ServedDisk>): Promise<void> {
  const { plan, journal, run } = backup
  if (fileDisks(plan).length === 0) return
  stage(run, 'export', 'Serving the frozen disks with qemu-nbd')
  const folder = newExportFolder()
  await journal.record({ step: 'export', folder })
  await makeExportFolder(folder)
  const outcomes = await Promise.allSettled(
    plan.disks.map(async diskPlan => {
      const { disk } = diskPlan
      if (!isFileDisk(disk)) return
      served.set(
        disk.name,
        await serveDisk(backup, disk, diskPlan, folder).catch(error => {
          throw diskError(disk.name, error)
        }),
      )
    }),
  )
  const failed = outcomes.find(outcome => outcome.status === 'rejected')
  if (failed) throw run.signal?.aborted ? abortError(run.signal) : failed.reason
}

async function streamDisks(
  backup: BackupContext,
  frozen: Frozen,
  served: ReadonlyMap<string, ServedDisk>,
): Promise<ManifestDisk[]> {
  const { plan, run, request } = backup
  stage(run, 'stream', 'Reading what is to be stored')
  const failed = new AbortController()
  const signal = run.signal ? AbortSignal.any([run.signal, failed.signal]) : failed.signal
  const limit = request.bandwidth === undefined ? undefined : new RateLimit(request.bandwidth)
  const queue = new PQueue({ concurrency: request.concurrency ?? 2 })
  const results = await Promise.allSettled(
    plan.disks.map(diskPlan =>
      queue.add(async () => {
        const { disk } = diskPlan
        try {
          const context = { ...backup, run: { ...run, signal } }
          return await (isFileDisk(disk)
            ? streamFileDisk(context, disk, diskPlan, served, limit)
            : streamRbdDisk(context, disk, diskPlan, frozen.snapshots, limit))
        } catch (error) {
          const failure = diskError(disk.name, error)
          failed.abort(failure)
          throw failure
        }
      }),
    ),
  )
  if (failed.signal.aborted) throw run.signal?.aborted ? abortError(run.signal) : failed.signal.reason
  return results.flatMap(result => (result.status === 'fulfilled' ? [result.value] : []))
}

async function readNvram(path: string, run: RunOptions): Promise<Buffer | undefined> {
  try {
    return await readFile(path)
  } catch (error) {
    // libvirt makes it at the first start, so an instance that never ran has none.
    emit(run, {
      type: 'warning',
      message: `The UEFI variables are not in the backup: ${errorMessage(error)}`,
    })
    return undefined
  }
}
