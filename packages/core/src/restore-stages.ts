import { randomUUID } from 'node:crypto'
import { writeFile } from 'node:fs/promises'
import { backupOfMark, markName, marksOfBackups } from './backup-plan.ts'
import type { StoredBackup } from './backups.ts'
import { fileIdentity, ownerOf } from './bitmap-twin.ts'
import { type DiskSource, diskDefinition, readDomainXml, rewriteDomainXml } from './domain-xml.ts'
import { abortError, isVarveError, VarveError } from './errors.ts'
import { fileState } from './file-state.ts'
import type { Instance, RbdDisk } from './host.ts'
import { assertUnused } from './image-lock.ts'
import { ranBeforeCut } from './incomplete.ts'
import type { ImageRename, Rename } from './journal.ts'
import { loadRecorded } from './load-object.ts'
import type { ManifestFile } from './manifest.ts'
import { assertNameIsFree } from './put-in-place.ts'
import { addImageBitmap, readImageInfo, removeImageBitmaps } from './qemu-img.ts'
import { type RestoreContext, recordTarget, stage } from './restore-context.ts'
import { type DiskRestore, planRestore, type RestorePlan } from './restore-plan.ts'
import { assertImageUnused, type RbdRestore } from './restore-plan-rbd.ts'
import { targetError } from './restore-target.ts'
import { emit, type RunOptions } from './run-options.ts'
import { statIfThere } from './stat-if-there.ts'
import type { StorageDriver } from './storage.ts'
import { takeOwnership } from './take-ownership.ts'
import { markImage, targetImage } from './write-rbd-image.ts'

/**
 * Gives each qcow2 target a fresh bitmap of the restored backup, so that the chain goes on from it; a disk of
 * another instance has no part in the chain. An RBD image gets a snapshot; not a copy of one, as no backup of it would
 * ever remove that. In place, the bitmaps of the instance's other backups on this storage go: all that they would tell is
 * that everything was written. So do the snapshots of {@link supersededBackups}.
 */
export async function mark(
  { backup, plan, request, run }: RestoreContext,
  backups: readonly StoredBackup[],
): Promise<void> {
  const { manifest } = backup
  const elsewhere = plan.newInstance ?? (plan.instance && plan.instance.name !== manifest.instance.name)
  if (elsewhere) return
  const known = new Set(backups.map(stored => stored.manifest.id))
  const files = plan.disks.flatMap(one =>
    one.format !== 'rbd' && one.holdsBitmaps && one.disk.format === 'qcow2' && one.disk.bitmap
      ? [{ bitmap: one.disk.bitmap, name: one.disk.name, path: one.temporary ?? one.target }]
      : [],
  )
  const images = plan.disks.filter(
    (disk): disk is RbdRestore =>
      disk.format === 'rbd' &&
      disk.disk.format === 'rbd-diff' &&
      (plan.instance !== undefined || disk.image === disk.disk.source.path),
  )
  const what = [...(files.length > 0 ? ['bitmap'] : []), ...(images.length > 0 ? ['snapshot'] : [])]
  if (what.length > 0) stage(run, 'mark', `Adding the ${what.join(' and the ')} ${markName(manifest.id)}`)
  for (const { bitmap, ...disk } of files) {
    if (request.inPlace) {
      const { bitmaps } = await readImageInfo(disk.path, 'qcow2', run)
      const names = bitmaps.map(({ name }) => name)
      const old = names.filter(name => known.has(backupOfMark(ownerOf(name)) ?? ''))
      await removeImageBitmaps(disk.path, old, run)
    }
    await addImageBitmap(disk, bitmap, run)
  }
  const superseded = supersededBackups(manifest.id, plan, backups)
  for (const image of images) {
    await markImage(image, manifest.id, run)
    if (image.existing && request.inPlace) await removeMarks(image, image.existing, superseded, run)
  }
}

/**
 * The backups that are newer than the restored one, which the next backup would else take for its parent by the snapshots
 * that images still have of them. Not those with a disk that was not restored: its chain goes on from them.
 */
function supersededBackups(
  restored: string,
  { disks }: RestorePlan,
  backups: readonly StoredBackup[],
): ReadonlySet<string> {
  const names = new Set(disks.map(({ disk }) => disk.name))
  const superseded = backups.filter(
    ({ manifest }) => manifest.id > restored && manifest.disks.every(({ name }) => names.has(name)),
  )
  return new Set(superseded.map(({ manifest }) => manifest.id))
}

/** Removes the snapshots of some backups from an image; one that clones need stays. */
async function removeMarks(
  { cluster, image }: RbdRestore,
  existing: RbdDisk,
  backups: ReadonlySet<string>,
  run: RunOptions,
): Promise<void> {
  for (const snapshot of marksOfBackups(existing, backups)) {
    await cluster.removeSnapshots(image, [snapshot], run).catch(error => {
      if (!isVarveError(error, 'RBD_SNAPSHOT_PROTECTED')) throw error
      const message = `${error.message} The next backup goes on from that snapshot, and not from the restored backup.`
      emit(run, { type: 'warning', message })
    })
  }
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
  const { name } = instance
  const timeoutMs = request.powerOffTimeoutMs ?? 60_000
  // As it is by now: since the plan hours may have gone by.
  const running = !(await host.waitUntilOff(name, 0, run))
  const restored = new Set(plan.disks.map(({ target }) => target))
  const ran = running || (await ranBeforeCut(journal.stateDir, instance, restored))
  await journal.record({
    step: 'power-off',
    instance: name,
    wasRunning: running,
    start: request.start ?? ran,
    timeoutMs,
  })
  try {
    if (running) await host.powerOff(name, timeoutMs, run)
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
  host,
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
  const disks = Object.fromEntries(plan.disks.map(disk => [disk.disk.name, sourceOf(disk, instance)]))
  const renewed = plan.disks.flatMap(({ disk, temporary }) => (temporary === undefined ? [] : disk.name))
  // A new instance never shares the original's variables: without stored ones libvirt makes them from the template.
  const storedNvram = readDomainXml(stored).nvram
  const isUefi = nvram !== undefined || storedNvram !== undefined
  const nvramTarget = isUefi
    ? (newInstance?.nvram ?? instance?.nvram ?? ownNvram(name, storedNvram))
    : undefined
  const renamed = newInstance && newInstance.name !== backup.manifest.instance.name
  // An instance that was made anew under its old name has another UUID, which libvirt does not let go. A copy has
  // one from here, so that it can be defined again after a definition that was cut short.
  const uuid = instance?.uuid ?? (renamed ? randomUUID() : undefined)
  // The images of a copy are made where the original has its own by now.
  const isRbdCopy = newInstance && plan.disks.some(({ format }) => format === 'rbd')
  const now = isRbdCopy ? await host.describe(backup.manifest.instance.name, run) : instance?.definition
  const xml = rewriteDomainXml(stored, {
    disks,
    dropBacking: renewed,
    onlyTheseDisks: newInstance !== undefined,
    ...(now !== undefined && { now }),
    ...(renamed && { copyAs: newInstance.name }),
    ...(uuid !== undefined && { uuid }),
    ...(nvramTarget !== undefined && { nvram: nvramTarget }),
  })
  await journal.record({ step: 'define', instance: name, xml })
  if (!nvram || nvramTarget === undefined) return undefined
  const temporary = `${nvramTarget}.varve-restore-${journal.header.id}`
  await recordTarget(journal, temporary)
  const variables = await fetchFile(storage, backup.folder, nvram, run)
  await writeFile(temporary, variables, { mode: 0o600, flush: true }).catch(error => {
    throw targetError(error, temporary)
  })
  await takeOwnership(temporary, nvramTarget)
  return renameOf(temporary, nvramTarget, newInstance !== undefined)
}

/** Where a restored disk is to be defined: as the instance that has it calls it by now. */
function sourceOf(restore: DiskRestore, instance: Instance | undefined): DiskSource {
  const { disk, target: path } = restore
  if (restore.format === 'rbd') return { path, format: 'raw' }
  const { format, blockDevice = false } = restore
  const definition = instance?.definition && diskDefinition(instance.definition, disk.name)
  return definition ? { definition } : { path, format, blockDevice }
}

/**
 * The file of UEFI variables that a stored definition names, for an instance that has none by now. What comes from a
 * storage must not say where to write, so that is where libvirt puts them by itself, or nowhere.
 */
function ownNvram(instance: string, stored: string | undefined): string | undefined {
  if (stored === undefined || stored === `/var/lib/libvirt/qemu/nvram/${instance}_VARS.fd`) return stored
  throw new VarveError(
    'INVALID_ARGUMENT',
    `The definition in the backup has its UEFI variables in ${stored}, and ${instance} has none by now: Varve does not write where a backup says. Give the instance a file for them (virsh edit ${instance}, <nvram> in <os>), or restore its disks alone. Nothing was changed.`,
    { context: { instance, path: stored } },
  )
}

/** From here on the restore is carried through. Refused, as long as it can be undone, where a disk is in use again or
 * a new file's name is taken. */
export async function finish(restore: RestoreContext, nvram: Rename | undefined): Promise<void> {
  const { plan, journal, run } = restore
  const files: Rename[] = []
  const images: ImageRename[] = []
  for (const disk of plan.disks) {
    const { temporary, target } = disk
    if (temporary === undefined) continue
    if (disk.format === 'rbd') {
      if (disk.existing) await assertImageUnused(disk.cluster, disk.image, run)
      const id = await disk.cluster.imageId(temporary, run)
      if (id === undefined) throw newDiskGone(`RBD image ${temporary}`, { image: temporary })
      const isNew = disk.existing === undefined
      const replaces = isNew ? {} : { replaces: await disk.cluster.imageState(disk.image, run) }
      images.push({
        ...targetImage(restore, disk, temporary),
        target: disk.image,
        id,
        ...replaces,
        isNew,
      })
    } else files.push(await renameOf(temporary, target, disk.isNew ?? false))
  }
  if (nvram) files.push(nvram)
  const renames: Rename[] = []
  for (const rename of files) {
    if (rename.isNew) await assertNameIsFree(rename)
    await assertUnused(rename.target, run)
    renames.push(await withReplaced(rename))
  }
  if (run.signal?.aborted) throw abortError(run.signal)
  await journal.record({ step: 'finish', renames, images })
}

async function renameOf(temporary: string, target: string, isNew: boolean): Promise<Rename> {
  if (!(await statIfThere(temporary))) throw newDiskGone(`file ${temporary}`, { path: temporary })
  return { temporary, target, identity: await fileIdentity(temporary), isNew }
}

/** Nothing may be replaced later but what is there now. */
async function withReplaced(rename: Rename): Promise<Rename> {
  if (rename.isNew || !(await statIfThere(rename.target))) return { ...rename, isNew: true }
  const replaces = await fileState(rename.target)
  return { ...rename, ...(replaces && { replaces }) }
}

function newDiskGone(what: string, context: VarveError['context']): VarveError {
  return new VarveError(
    'DISK_NOT_FOUND',
    `The new ${what} was removed by somebody before it could take its name. Nothing was changed; restore again.`,
    { context, retryable: true },
  )
}

async function fetchFile(
  storage: StorageDriver,
  folder: string,
  file: ManifestFile,
  run: RunOptions,
): Promise<Buffer> {
  const key = `${folder}/${file.key}`
  const { signal = new AbortController().signal } = run
  const remedy = 'Restore the disks alone, or another backup.'
  return loadRecorded({ storage, ...file, key, signal, remedy })
}
