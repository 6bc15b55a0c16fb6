import type { Stats } from 'node:fs'
import { realpath } from 'node:fs/promises'
import { basename, dirname, isAbsolute, join, resolve } from 'node:path'
import { chooseDisks } from './backup-plan.ts'
import type { StoredBackup } from './backups.ts'
import { readDomainXml } from './domain-xml.ts'
import { isVarveError, VarveError } from './errors.ts'
import { type FileDisk, type Host, type HostDisk, type Instance, isFileDisk } from './host.ts'
import { assertUnused } from './image-lock.ts'
import type { ManifestDisk } from './manifest.ts'
import { offlineDisk, readImageInfo, readOfflineDisk, resolveDisk } from './qemu-img.ts'
import { RBD_PREFIX, rbdImageOf } from './rbd.ts'
import type { RestoreDestination, RestoreRequest } from './restore-pipeline.ts'
import { planRbdDisk, planRbdPath, type RbdRestore } from './restore-plan-rbd.ts'
import { targetError } from './restore-target.ts'
import type { RunOptions } from './run-options.ts'
import { statIfThere } from './stat-if-there.ts'
import { instanceFolder } from './storage-layout.ts'

/** How one disk is written to a file or a block device. */
export interface FileRestore {
  readonly disk: ManifestDisk
  readonly format: 'qcow2' | 'raw'
  /** The file or device that holds the disk in the end, symbolic links resolved. */
  readonly target: string
  /** The new file that takes the target's place once it is complete; absent for a restore in place. */
  readonly temporary?: string
  /** Whether nothing may be at the target when the new file gets its name. Default: false. */
  readonly isNew?: boolean
  /** Whether the target is a block device. Default: false. */
  readonly blockDevice?: boolean
  /** Whether what is written to can carry bitmaps. */
  readonly holdsBitmaps: boolean
}

/** How one disk is written. */
export type DiskRestore = FileRestore | RbdRestore

/** What a restore does to a host. */
export interface RestorePlan {
  readonly disks: readonly DiskRestore[]
  /** The instance that is switched off for it. */
  readonly instance?: Instance
  /** The disks of it whose backing file its definition names, which would show through the restored disk. */
  readonly backed?: readonly string[]
  /** The instance that is defined anew. */
  readonly newInstance?: {
    readonly name: string
    /** Where its UEFI variables go, if it has any. */
    readonly nvram: string
  }
}

/** How a plan is made. */
interface PlanOptions {
  /** Whether targets that are named by their path are looked into; else only where they are is told. Default: true. */
  readonly looksAtImages?: boolean
}

/**
 * Finds the targets and refuses what cannot work, before anything is touched.
 *
 * @throws DISK_BUSY, DISK_NOT_FOUND, DISK_UNSUPPORTED, INSTANCE_NOT_FOUND, INSTANCE_TRANSIENT, MEMORY_SAVED,
 *   TARGET_EXISTS, TARGET_TOO_SMALL, INVALID_ARGUMENT
 */
export async function planRestore(
  request: RestoreRequest,
  backup: StoredBackup,
  host: Host,
  runId: string,
  run: RunOptions,
  options: PlanOptions = {},
): Promise<RestorePlan> {
  const { to } = request
  if ('instance' in to) return planInstance(request, to.instance, backup, host, runId, run)
  if ('newInstance' in to) return planNewInstance(request, to, backup, host, runId, run, options)
  const disks: DiskRestore[] = []
  for (const name of new Set(request.disks ?? Object.keys(to.disks))) {
    const path = to.disks[name]
    if (path === undefined)
      throw new VarveError(
        'INVALID_ARGUMENT',
        `No target was given for the disk ${name}. Name one for it (to.disks, --to-disk ${name}=PATH), or leave the disk out.`,
        {
          context: { disk: name },
        },
      )
    disks.push(await planPath(request, to, diskOf(backup, name), path, host, runId, run, options))
  }
  if (disks.length === 0)
    throw new VarveError(
      'INVALID_ARGUMENT',
      'No disk was chosen to restore. Name at least one and its target.',
    )
  if (new Set(disks.map(({ target }) => target)).size < disks.length) {
    throw new VarveError('INVALID_ARGUMENT', 'Two disks have the same target. Give each a file of its own.')
  }
  return { disks }
}

async function planPath(
  { inPlace = false }: RestoreRequest,
  to: { format?: 'qcow2' | 'raw'; overwrite?: boolean },
  disk: ManifestDisk,
  path: string,
  host: Host,
  runId: string,
  run: RunOptions,
  options: PlanOptions,
): Promise<DiskRestore> {
  const image = rbdImageOf(path)
  if (image !== undefined) {
    const rbdOptions = { ...options, inPlace, overwrite: to.overwrite ?? false, runId }
    return planRbdPath(disk, image, await host.rbd(undefined, run), rbdOptions, run)
  }
  if (inPlace) return planInPlacePath(disk, path, { ...options, ...to }, run)
  return planNewFile(disk, path, { ...options, ...to }, runId, run)
}

async function planInstance(
  request: RestoreRequest,
  name: string,
  backup: StoredBackup,
  host: Host,
  runId: string,
  run: RunOptions,
): Promise<RestorePlan> {
  if (request.definition === 'restore' && backup.manifest.instance.name !== name) {
    throw new VarveError(
      'INVALID_ARGUMENT',
      `The definition in the backup ${backup.manifest.id} is that of ${backup.manifest.instance.name} and not of ${name}. Restore the disks alone, or a new instance.`,
      { context: { instance: name, backup: backup.manifest.id } },
    )
  }
  const instance = await host.instance(name, run)
  if (instance.savedMemory) {
    throw new VarveError(
      'MEMORY_SAVED',
      `${name} is off with its memory saved (virsh managedsave). At its next start it would go on with that memory on the restored disks, which ruins its file systems. Start it and shut it down, or drop the memory with "virsh managedsave-remove ${name}", and restore again. Nothing was changed.`,
      { context: { instance: name } },
    )
  }
  if (instance.transient) {
    throw new VarveError(
      'INSTANCE_TRANSIENT',
      `${name} is a transient domain: switched off for a restore, it would be gone. Store its definition (virsh dumpxml ${name} >FILE, virsh define FILE) and restore again, or restore its disks to new files. Nothing was changed.`,
      { context: { instance: name } },
    )
  }
  const names = request.disks ?? backup.manifest.disks.map(disk => disk.name)
  const disks: DiskRestore[] = []
  for (const target of chooseDisks(instance, names)) {
    const disk = diskOf(backup, target.name)
    if (request.inPlace) assertFits(disk, target)
    if (!isFileDisk(target)) {
      disks.push(await planRbdDisk(disk, target, { inPlace: request.inPlace ?? false, runId }, run))
      continue
    }
    const { path, format, blockDevice, holdsBitmaps, readOnly = false } = target
    if (request.inPlace) {
      assertNoDataFile(target)
      disks.push({ disk, format, target: path, blockDevice, holdsBitmaps })
      continue
    }
    if (blockDevice) {
      throw new VarveError(
        'INVALID_ARGUMENT',
        `The disk ${target.name} of ${name} is the block device ${path}, which cannot be replaced by a new file. Restore it in place.`,
        {
          context: { disk: target.name, path },
        },
      )
    }
    const temporary = temporaryOf(path, runId)
    disks.push({ disk, format, target: path, temporary, holdsBitmaps: format === 'qcow2' && !readOnly })
  }
  const renewed = new Set(disks.flatMap(({ disk, temporary }) => (temporary === undefined ? [] : disk.name)))
  return { disks, instance, backed: backedDisks(instance).filter(disk => renewed.has(disk)) }
}

function backedDisks({ definition }: Instance): string[] {
  if (definition === undefined) return []
  return readDomainXml(definition).disks.flatMap(({ backed, name }) => (backed ? [name] : []))
}

async function planNewInstance(
  request: RestoreRequest,
  to: Extract<RestoreDestination, { newInstance: string }>,
  backup: StoredBackup,
  host: Host,
  runId: string,
  run: RunOptions,
  options: PlanOptions,
): Promise<RestorePlan> {
  const { newInstance: name, directory } = to
  if (request.inPlace) {
    throw new VarveError(
      'INVALID_ARGUMENT',
      'A new instance gets new disks, so there is nothing to restore in place (inPlace, --in-place). Leave that out, or name an instance or files that are there.',
    )
  }
  instanceFolder(name) // refuses names that are none
  if (name.includes('/'))
    throw new VarveError(
      'INVALID_ARGUMENT',
      `Not an instance name: ${name}. libvirt allows no slash in one; choose another.`,
      {
        context: { instance: name },
      },
    )
  if (!backup.manifest.definition) {
    throw new VarveError(
      'INVALID_ARGUMENT',
      `The backup ${backup.manifest.id} holds no definition of its instance. Restore its disks to files instead.`,
    )
  }
  await host.instance(name, run).then(
    () => {
      throw new VarveError(
        'TARGET_EXISTS',
        `There is an instance ${name} already. Choose another name, or restore to that instance.`,
        { context: { instance: name } },
      )
    },
    error => {
      if (!isVarveError(error, 'INSTANCE_NOT_FOUND')) throw error
    },
  )
  const format = to.format ?? 'qcow2'
  const disks: DiskRestore[] = []
  const names = new Set(request.disks ?? backup.manifest.disks.map(disk => disk.name))
  if (names.size === 0) {
    throw new VarveError(
      'INVALID_ARGUMENT',
      `No disk was chosen for ${name}. Name at least one, or leave the choice out for all of them.`,
      { context: { instance: name } },
    )
  }
  for (const diskName of names) {
    const disk = diskOf(backup, diskName)
    if (disk.format === 'rbd-diff' && to.rbdPool !== undefined) {
      const path = `${RBD_PREFIX}${to.rbdPool}/${name}-${diskName}`
      const image = rbdImageOf(path) ?? path
      const of = { instance: backup.manifest.instance.name, disk: diskName }
      const rbdOptions = { ...options, inPlace: false, overwrite: false, runId }
      disks.push({ ...(await planRbdPath(disk, image, await host.rbd(of, run), rbdOptions, run)), of })
      continue
    }
    const path = join(directory, `${name}-${diskName}.${format}`)
    disks.push(await planNewFile(disk, path, { ...options, format }, runId, run))
  }
  const nvram = await resolveTarget(join(directory, `${name}-nvram.fd`))
  if (await lookAt(nvram)) {
    throw new VarveError(
      'TARGET_EXISTS',
      `${nvram}, the file of the UEFI variables, is there already. Choose another name or folder, or remove it.`,
      { context: { path: nvram } },
    )
  }
  return { disks, newInstance: { name, nvram } }
}

async function planNewFile(
  disk: ManifestDisk,
  path: string,
  options: PlanOptions & { format?: 'qcow2' | 'raw'; overwrite?: boolean },
  runId: string,
  run: RunOptions,
): Promise<FileRestore> {
  const target = await resolveTarget(path)
  const status = await lookAt(target)
  const context = { disk: disk.name, path: target }
  if (status?.isDirectory())
    throw new VarveError('INVALID_ARGUMENT', `${target} is a folder. Name a file in it.`, { context })
  if (status && !status.isFile()) {
    throw new VarveError(
      'INVALID_ARGUMENT',
      `${target} is no ordinary file. Restore to a block device in place.`,
      { context },
    )
  }
  if (status && !options.overwrite) {
    throw new VarveError(
      'TARGET_EXISTS',
      `${target} is there already. Choose another path, or ask for it to be overwritten (overwrite, --overwrite).`,
      { context },
    )
  }
  const { format = 'qcow2', overwrite = false, looksAtImages = true } = options
  if (looksAtImages) await assertUnused(target, run)
  const temporary = temporaryOf(target, runId)
  return { disk, format, target, temporary, isNew: !overwrite, holdsBitmaps: format === 'qcow2' }
}

async function planInPlacePath(
  disk: ManifestDisk,
  path: string,
  { format, looksAtImages = true }: PlanOptions & { format?: 'qcow2' | 'raw' },
  run: RunOptions,
): Promise<FileRestore> {
  if (!looksAtImages) {
    const target = await resolveDisk(disk.name, path)
    return { disk, format: format ?? 'raw', target, holdsBitmaps: false }
  }
  const target = await (format ? readOfflineDisk(disk.name, path, format, run) : guess(disk.name, path, run))
  assertNoDataFile(target)
  await assertUnused(target.path, run)
  assertFits(disk, target)
  return { disk, format: target.format, target: target.path, holdsBitmaps: target.holdsBitmaps }
}

/**
 * A target whose format nobody has stated. A guest can write any header into a raw disk, and with it name files of the
 * host: such a header is not believed.
 */
async function guess(name: string, path: string, run: RunOptions): Promise<FileDisk> {
  const resolved = await resolveDisk(name, path)
  const info = await readImageInfo(resolved, undefined, run)
  const { format } = info
  if (format !== 'qcow2' && format !== 'raw') {
    throw new VarveError(
      'DISK_UNSUPPORTED',
      `${path} looks like an image of the format ${format}. Varve writes qcow2 and raw in place: where it is a raw disk, state that (format, --format raw).`,
      { context: { disk: name, path, format } },
    )
  }
  const target = await offlineDisk(name, resolved, format, info)
  if (
    format === 'qcow2' &&
    (target.blockDevice || info.backing !== undefined || target.dataFile !== undefined)
  ) {
    throw new VarveError(
      'INVALID_ARGUMENT',
      `${path} looks like a qcow2 image, which a guest can make a raw disk look like. State its format (format, --format) to restore to it in place.`,
      { context: { disk: name, path } },
    )
  }
  return target
}

/** Refuses an image in place whose data is in a file that only its header names. */
function assertNoDataFile({ name, path, dataFile }: FileDisk): void {
  if (dataFile === undefined) return
  throw new VarveError(
    'DISK_UNSUPPORTED',
    `The image ${path} names the external data file ${dataFile}, which Varve does not write to. Restore ${name} to a new file. Nothing was changed.`,
    { context: { disk: name, path, dataFile } },
  )
}

/** Refuses a target in place that is smaller than the disk in the backup. */
export function assertFits(disk: ManifestDisk, target: HostDisk): void {
  if (target.virtualSize >= disk.virtualSize) return
  throw new VarveError(
    'TARGET_TOO_SMALL',
    `The disk ${disk.name} has ${disk.virtualSize} bytes in the backup, its target ${target.path} only ${target.virtualSize}. Enlarge the target, or restore to a new file.`,
    {
      context: {
        disk: disk.name,
        path: target.path,
        needed: disk.virtualSize,
        available: target.virtualSize,
      },
    },
  )
}

function diskOf({ manifest }: StoredBackup, name: string): ManifestDisk {
  const disk = manifest.disks.find(disk => disk.name === name)
  if (disk) return disk
  const names = manifest.disks.map(disk => disk.name)
  throw new VarveError(
    'DISK_NOT_FOUND',
    `The backup ${manifest.id} has no disk ${name}. It has ${names.join(', ')}.`,
    {
      context: { backup: manifest.id, disk: name, disks: names },
    },
  )
}

/** What is at the path of a target. @throws TARGET_FAILED where that cannot be told */
async function lookAt(path: string): Promise<Stats | undefined> {
  return statIfThere(path).catch(error => {
    throw targetError(error, path)
  })
}

/** The file that a path means: the end of a symbolic link, or a new name in a folder that is there. */
async function resolveTarget(path: string): Promise<string> {
  const absolute = isAbsolute(path) ? path : resolve(path)
  if (await lookAt(absolute)) return realpath(absolute)
  const folder = await realpath(dirname(absolute)).catch(error => {
    throw new VarveError(
      'INVALID_ARGUMENT',
      `There is no folder ${dirname(absolute)} for the restored disk. Make it first.`,
      { context: { path: absolute }, cause: error },
    )
  })
  return join(folder, basename(absolute))
}

/** Beside the target, so that a rename takes its place at once. */
function temporaryOf(target: string, runId: string): string {
  return `${target}.varve-restore-${runId}`
}
