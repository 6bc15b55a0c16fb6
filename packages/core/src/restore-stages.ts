import { randomUUID } from 'node:crypto'
import { chmod, chown, mkdir, writeFile } from 'node:fs/promises'
import { NbdClient } from '@varve/nbd'
import type { LayeredExtents } from '@varve/qcow2'
import { backupOfMark, markName, restoredKey, snapshotObstacle } from './backup-plan.ts'
import type { StoredBackup } from './backups.ts'
import { blake3Hex } from './digest.ts'
import { readDomainXml, rewriteDomainXml } from './domain-xml.ts'
import { abortError, VarveError } from './errors.ts'
import type { RestoreStage } from './events.ts'
import type { Host } from './host.ts'
import { assertUnused } from './image-lock.ts'
import type { ImageRename, Rename, RunJournal, TargetImage } from './journal.ts'
import { loadObject } from './load-object.ts'
import type { ManifestFile } from './manifest.ts'
import { NbdTarget } from './nbd-target.ts'
import { Progress } from './progress.ts'
import { assertNameIsFree } from './put-in-place.ts'
import { Qcow2FileTarget } from './qcow2-file-target.ts'
import { addImageBitmap, readImageInfo, removeImageBitmaps } from './qemu-img.ts'
import { exportDisk, newExportFolder } from './qemu-nbd.ts'
import { RawFileTarget } from './raw-file-target.ts'
import { restoreDisk } from './restore-disk.ts'
import type { RestoredDisk, RestoreRequest } from './restore-pipeline.ts'
import { type DiskRestore, type FileRestore, planRestore, type RestorePlan } from './restore-plan.ts'
import { assertImageUnused, type RbdRestore } from './restore-plan-rbd.ts'
import type { RestoreTarget } from './restore-target.ts'
import { emit, type RunOptions } from './run-options.ts'
import { statIfThere } from './stat-if-there.ts'
import type { StorageDriver } from './storage.ts'

/** What the stages of one restore share. */
export interface RestoreContext {
  readonly backup: StoredBackup
  /** The full backup first, the one to restore last. */
  readonly chain: readonly StoredBackup[]
  readonly host: Host
  readonly storage: StorageDriver
  readonly request: RestoreRequest
  readonly plan: RestorePlan
  readonly journal: RunJournal
  readonly run: RunOptions
}

/** Tells that a stage begins, unless the run was given up. */
export function stage(run: RunOptions, name: RestoreStage, message: string): void {
  if (run.signal?.aborted) throw abortError(run.signal)
  emit(run, { type: 'stage', stage: name, message })
}

/** Writes every disk, one after the other: each uses the whole of the storage's rate. */
export async function writeDisks(restore: RestoreContext): Promise<RestoredDisk[]> {
  const { plan, journal, run } = restore
  const restored: RestoredDisk[] = []
  for (const disk of plan.disks) {
    stage(run, 'write', `Restoring ${disk.disk.name} to ${disk.target}`)
    if (disk.format === 'rbd') restored.push(await writeRbd(restore, disk))
    else if (disk.temporary !== undefined) {
      await journal.record({ step: 'target-create', temporary: disk.temporary })
      const { temporary } = disk
      restored.push(await writeDisk(restore, disk, merged => newFile(disk, temporary, merged)))
      await takeOwnership(temporary, disk.target)
    } else restored.push(await writeInPlace(restore, disk))
  }
  if (restore.request.inPlace) await journal.record({ step: 'written-in-place' })
  return restored
}

function newFile(disk: FileRestore, path: string, merged: LayeredExtents): Promise<RestoreTarget> {
  if (disk.format === 'raw') return RawFileTarget.create({ path }, merged)
  const clusterSize = disk.disk.format === 'qcow2' ? { clusterSize: disk.disk.clusterSize } : {}
  return Qcow2FileTarget.create({ path, ...clusterSize }, merged)
}

async function writeInPlace(restore: RestoreContext, disk: FileRestore): Promise<RestoredDisk> {
  const { format, target: path } = disk
  await restore.journal.record({ step: 'write-in-place', disk: disk.disk.name, path })
  return writeExport(restore, disk, { path, format })
}

/** Writes a new RBD image, or over the one that is there. */
async function writeRbd(restore: RestoreContext, disk: RbdRestore): Promise<RestoredDisk> {
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
  await using opened = await cluster.open(temporary ?? image)
  const isNew = temporary !== undefined
  // Awaited here: what was opened has the file of the key until QEMU is done.
  return await writeExport(restore, disk, {
    path: opened.fileName,
    format: 'raw',
    isNew,
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

function targetImage({ plan }: RestoreContext, { disk }: RbdRestore, image: string): TargetImage {
  return { image, ...(plan.instance && { of: { instance: plan.instance.name, disk: disk.name } }) }
}

/** Writes to what QEMU opens, through a `qemu-nbd` of its own. */
async function writeExport(
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
    return await writeDisk({ ...restore, run: { ...run, signal } }, disk, createTarget, base)
  } catch (error) {
    throw server.died.aborted && !run.signal?.aborted ? server.died.reason : error
  }
}

async function writeDisk(
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

/** The new file belongs to whom the old one did. */
async function takeOwnership(temporary: string, target: string): Promise<void> {
  const old = await statIfThere(target)
  if (!old) return
  await chmod(temporary, old.mode & 0o7777)
  await chown(temporary, old.uid, old.gid)
}

/**
 * Gives each qcow2 target a fresh bitmap of the restored backup, so that the chain goes on from it; a disk of
 * another instance has no part in the chain. An RBD image gets a snapshot. In place, the bitmaps of the instance's other backups on this
 * storage go: all that they would tell is that everything was written.
 */
export async function mark(
  { backup, plan, request, run }: RestoreContext,
  backups: readonly StoredBackup[],
): Promise<void> {
  const { manifest } = backup
  const elsewhere = plan.newInstance ?? (plan.instance && plan.instance.name !== manifest.instance.name)
  if (elsewhere) return
  const known = new Set(backups.map(stored => stored.manifest.id))
  const files = plan.disks.flatMap(({ disk, format, target, temporary }) =>
    format === 'qcow2' && disk.format === 'qcow2' && disk.bitmap
      ? [{ bitmap: disk.bitmap, path: temporary ?? target }]
      : [],
  )
  const images = plan.disks.filter(
    (disk): disk is RbdRestore => disk.format === 'rbd' && disk.disk.format === 'rbd-diff',
  )
  const what = [...(files.length > 0 ? ['bitmap'] : []), ...(images.length > 0 ? ['snapshot'] : [])]
  if (what.length > 0) stage(run, 'mark', `Adding the ${what.join(' and the ')} ${markName(manifest.id)}`)
  for (const { bitmap, path } of files) {
    if (request.inPlace) {
      const { bitmaps } = await readImageInfo(path, 'qcow2', run)
      const old = bitmaps.map(({ name }) => name).filter(name => known.has(backupOfMark(name) ?? ''))
      await removeImageBitmaps(path, old, run)
    }
    await addImageBitmap(path, bitmap.name, bitmap.granularity, run)
  }
  for (const image of images) await markImage(image, manifest.id, run)
}

/**
 * A snapshot of the restored content, and in the image's metadata which one it is: the manifest has the number of
 * the snapshot that was backed up. Where that one is still there its content is the restored one.
 */
async function markImage(
  { cluster, image, existing, temporary }: RbdRestore,
  backupId: string,
  run: RunOptions,
): Promise<void> {
  const name = markName(backupId)
  if (temporary === undefined && existing?.state.snapshots.some(snapshot => snapshot.name === name)) return
  const snapshot = await cluster.createSnapshot(temporary ?? image, name, run)
  await cluster.setMetadata(temporary ?? image, restoredKey(backupId), String(snapshot.id), run)
}

/** Switches the instance off, if there is one; `settleRestore` starts it again. */
export async function powerOff(restore: RestoreContext): Promise<void> {
  const { host, plan, journal, request, run } = restore
  const { instance, newInstance } = plan
  if (newInstance && request.start)
    await journal.record({
      step: 'power-off',
      instance: newInstance.name,
      wasRunning: false,
      start: true,
      timeoutMs: 0,
    })
  if (!instance) return
  stage(run, 'power-off', `Shutting ${instance.name} down`)
  const { name, running } = instance
  const timeoutMs = request.powerOffTimeoutMs ?? 60_000
  await journal.record({
    step: 'power-off',
    instance: name,
    wasRunning: running,
    start: request.start ?? running,
    timeoutMs,
  })
  try {
    await host.powerOff(name, timeoutMs, run)
  } finally {
    await journal.record({ step: 'powered-off' })
  }
  await assertUnmoved(restore)
}

/** The new disks may have taken hours, in which somebody may have made a snapshot: the old file is then its base. */
async function assertUnmoved({ backup, host, plan, journal, request, run }: RestoreContext): Promise<void> {
  const now = await planRestore(request, backup, host, journal.header.id, run)
  for (const [index, { disk, target }] of plan.disks.entries()) {
    const found = now.disks[index]?.target
    if (found === target) continue
    throw new VarveError(
      'DISK_BUSY',
      `The disk ${disk.name} was on ${target} when the restore began and is on ${found} by now. Nothing was changed; restore again.`,
      { context: { disk: disk.name, path: target, found }, retryable: true },
    )
  }
}

/**
 * Prepares the definition that `settleRestore` puts in place: of a new instance, or where it is asked for. Returns
 * the file of UEFI variables that goes with it. Comes first: no guest waits while it is fetched.
 */
export async function define({
  backup,
  storage,
  plan,
  request,
  journal,
  run,
}: RestoreContext): Promise<Rename | undefined> {
  const { definition, nvram } = backup.manifest
  const { newInstance } = plan
  const instance = request.definition === 'restore' ? plan.instance : undefined
  const name = newInstance?.name ?? instance?.name
  if (name === undefined) {
    const { instance: kept, backed = [] } = plan
    if (kept && backed.length > 0)
      await journal.record({ step: 'drop-backing', instance: kept.name, disks: backed })
    return undefined
  }
  if (!definition) {
    throw new VarveError(
      'INVALID_ARGUMENT',
      `The backup ${backup.manifest.id} holds no definition of its instance. Restore its disks alone.`,
    )
  }
  const stored = (await fetchFile(storage, backup.folder, definition, run)).toString('utf8')
  const disks = Object.fromEntries(
    plan.disks.map(({ disk, target: path, format }) => [
      disk.name,
      { path, format: format === 'rbd' ? 'raw' : format },
    ]),
  )
  // A new instance never shares the original's variables: without stored ones libvirt makes them from the template.
  const storedNvram = readDomainXml(stored).nvram
  const isUefi = nvram !== undefined || storedNvram !== undefined
  const nvramTarget = isUefi ? (newInstance?.nvram ?? instance?.nvram ?? storedNvram) : undefined
  const renamed = newInstance && newInstance.name !== backup.manifest.instance.name
  // An instance that was made anew under its old name has another UUID, which libvirt does not let go. A copy has
  // one from here, so that it can be defined again after a definition that was cut short.
  const uuid = instance?.uuid ?? (renamed ? randomUUID() : undefined)
  const xml = rewriteDomainXml(stored, {
    disks,
    onlyTheseDisks: newInstance !== undefined,
    ...(renamed && { copyAs: newInstance.name }),
    ...(uuid !== undefined && { uuid }),
    ...(nvramTarget !== undefined && { nvram: nvramTarget }),
  })
  await journal.record({ step: 'define', instance: name, xml })
  if (!nvram || nvramTarget === undefined) return undefined
  const temporary = `${nvramTarget}.varve-restore-${journal.header.id}`
  await journal.record({ step: 'target-create', temporary })
  await writeFile(temporary, await fetchFile(storage, backup.folder, nvram, run), {
    mode: 0o600,
    flush: true,
  })
  await takeOwnership(temporary, nvramTarget)
  return { temporary, target: nvramTarget, isNew: newInstance !== undefined }
}

/** From here on the restore is carried through. Refused, as long as it can be undone, where a disk is in use again or
 * a new file's name is taken. */
export async function finish(restore: RestoreContext, nvram: Rename | undefined): Promise<void> {
  const { plan, journal, run } = restore
  const renames: Rename[] = []
  const images: ImageRename[] = []
  for (const disk of plan.disks) {
    const { temporary, target } = disk
    if (temporary === undefined) continue
    if (disk.format === 'rbd') {
      if (disk.existing) await assertImageUnused(disk.cluster, disk.image, run)
      images.push({ ...targetImage(restore, disk, temporary), target: disk.image })
    } else renames.push({ temporary, target, isNew: disk.isNew ?? false })
  }
  if (nvram) renames.push(nvram)
  for (const rename of renames) {
    if (rename.isNew) await assertNameIsFree(rename)
    await assertUnused(rename.target, run)
  }
  if (run.signal?.aborted) throw abortError(run.signal)
  await journal.record({ step: 'finish', renames, images })
}

async function fetchFile(
  storage: StorageDriver,
  folder: string,
  file: ManifestFile,
  run: RunOptions,
): Promise<Buffer> {
  const key = `${folder}/${file.key}`
  const { signal = new AbortController().signal } = run
  const bytes = await loadObject({ storage, key, range: { start: 0, end: file.size }, signal })
  if (blake3Hex(bytes) === file.blake3) return bytes
  throw new VarveError(
    'DIGEST_MISMATCH',
    `${key} is not what was stored with the backup. Restore the disks alone, or another backup.`,
    { context: { key } },
  )
}
