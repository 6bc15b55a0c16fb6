import { maxDiskSize } from '@varve/qcow2'
import { isBackupId } from './backup-id.ts'
import type { Catalog, StoredBackup } from './backups.ts'
import { VarveError } from './errors.ts'
import { type FileDisk, type HostDisk, type InstanceDisks, isFileDisk, type RbdDisk } from './host.ts'
import type { FallbackReason, ManifestDisk } from './manifest.ts'
import { damagedBackups, unfitParent } from './parent-check.ts'
import { backupOfKey } from './storage-layout.ts'

/** Bytes that one bit of a new bitmap stands for. */
export const BITMAP_GRANULARITY = 65_536

/** Snapshots of an RBD image that stay after a backup: that of the backup and of the one before it. */
export const DEFAULT_RBD_SNAPSHOTS = 2

/**
 * The metadata of an RBD image that a restore of a disk to it leaves: the number of the snapshot that holds the backup. With
 * the disk's name, as two restored images may be exchanged by a rename.
 */
export function restoredKey(backupId: string, disk: string): string {
  return `varve.restored.${backupId}.${disk}`
}

/** The bitmap that records what changes after a backup, and the snapshot of an RBD image that the backup shows. */
export function markName(backupId: string): string {
  return `varve-${backupId}`
}

/** The backup that a bitmap or a snapshot of Varve's, `varve-<id>`, belongs to; undefined for others. */
export function backupOfMark(mark: string): string | undefined {
  const id = mark.startsWith('varve-') ? mark.slice('varve-'.length) : ''
  return isBackupId(id) ? id : undefined
}

/** Which disks: every one, the first one, or those named. One of these that cannot be backed up is an error. */
export type DiskSelection = 'all' | 'primary' | readonly string[]

/**
 * The disks that a request means.
 *
 * @throws DISK_NOT_FOUND, DISK_UNSUPPORTED
 */
export function chooseDisks<D extends { readonly name: string }>(
  instance: InstanceDisks<D>,
  selection: DiskSelection,
): D[] {
  const names = instance.disks.map(({ name }) => name)
  const context = { instance: instance.name, disks: names }
  if (selection === 'all') {
    for (const [disk, reason] of instance.unsupported) throw unsupported(instance, disk, reason)
  }
  if (instance.disks.length === 0) {
    const [first] = instance.unsupported
    if (first) throw unsupported(instance, ...first)
    throw new VarveError(
      'DISK_NOT_FOUND',
      `${instance.name} has no disk to back up. Add one to it (CD-ROMs and floppies do not count), or choose another instance.`,
      { context },
    )
  }
  if (selection === 'all') return [...instance.disks]
  if (selection === 'primary') return chooseDisks(instance, instance.primary ? [instance.primary] : [])
  if (selection.length === 0)
    throw new VarveError('INVALID_ARGUMENT', 'No disk was chosen. Name one, or use "all" or "primary".', {
      context,
    })
  return [...new Set(selection)].map(name => {
    const reason = instance.unsupported.get(name)
    if (reason !== undefined) throw unsupported(instance, name, reason)
    const disk = instance.disks.find(disk => disk.name === name)
    if (!disk)
      throw new VarveError(
        'DISK_NOT_FOUND',
        `${instance.name} has no disk ${name}. It has ${names.join(', ')}.`,
        {
          context: { ...context, disk: name },
        },
      )
    return disk
  })
}

/** Bytes of a cluster of an image, unless a request says otherwise. */
export const DEFAULT_CLUSTER_SIZE = 65_536

/**
 * Refuses a cluster size that is too small for a disk.
 *
 * @throws INVALID_ARGUMENT
 */
export function assertClustersFit(disks: readonly HostDisk[], clusterSize: number): void {
  for (const { name, virtualSize } of disks.filter(isFileDisk)) {
    if (virtualSize <= maxDiskSize(clusterSize)) continue
    let enough = clusterSize
    while (virtualSize > maxDiskSize(enough)) enough *= 2
    throw new VarveError(
      'INVALID_ARGUMENT',
      `The disk ${name} has ${virtualSize} bytes, and an image with clusters of ${clusterSize} bytes holds at most ${maxDiskSize(clusterSize)}. Choose a cluster size of ${enough} bytes or more.`,
      { context: { disk: name, virtualSize, clusterSize } },
    )
  }
}

function unsupported(instance: { readonly name: string }, disk: string, reason: string): VarveError {
  return new VarveError(
    'DISK_UNSUPPORTED',
    `The disk ${disk} of ${instance.name} cannot be backed up: ${reason}. Name the disks to back up without it.`,
    {
      context: { instance: instance.name, disk },
    },
  )
}

/** What one disk gets. */
export type DiskPlan =
  | { readonly disk: HostDisk; readonly kind: 'full'; readonly fallback?: FallbackReason }
  | {
      readonly disk: HostDisk
      readonly kind: 'incremental'
      /** The bitmap, or the snapshot, since which changes are stored. */
      readonly since: string
      readonly parentSize: number
      readonly backing: string
    }

/** What a backup gets. */
export interface BackupPlan {
  /** Absent when every disk gets a full image: the backup then begins a chain. */
  readonly parent?: StoredBackup
  readonly disks: readonly DiskPlan[]
}

/** What {@link planBackup} decides by. */
export interface PlanInput {
  readonly type: 'auto' | 'full' | 'incremental'
  readonly disks: readonly HostDisk[]
  /** All that this storage holds of the instance. */
  readonly catalog: Catalog
  readonly maxIncrementalChain: number
}

/**
 * Decides between a full and an incremental image for each disk. The parent is the newest backup on this
 * storage whose bitmap at least one of the disks carries: so a chain goes on from the backup that was
 * restored, and a bitmap never serves another backup than its own.
 *
 * @throws PARENT_MISSING when an increment was asked for and this storage holds no backup at all
 */
export function planBackup(input: PlanInput): BackupPlan {
  const { type, disks, catalog } = input
  const { backups } = catalog
  const full = (fallback?: FallbackReason): BackupPlan => ({
    disks: disks.map(disk => ({ disk, kind: 'full', ...(fallback && { fallback }) })),
  })
  if (type === 'full') return full()
  const damaged = damagedBackups(catalog)
  const newest = backups.at(-1)
  if (!newest) {
    if (type === 'auto' || damaged.size > 0) return full(damaged.size > 0 ? 'parent-broken' : 'no-parent')
    throw new VarveError(
      'PARENT_MISSING',
      'There is no backup of this instance on the storage that an increment could rest on. Take a full backup first, or use the type auto.',
    )
  }
  const usable = [...backups]
    .reverse()
    .find(backup => disks.some(disk => obstacle(disk, backup, damaged) === undefined))
  const parent = usable ?? newest
  const unfit = usable && unfitParent(usable, catalog, input.maxIncrementalChain)
  if (unfit) return full(unfit)
  const plans = disks.map((disk): DiskPlan => {
    const before = parent.manifest.disks.find(({ name }) => name === disk.name)
    const fallback = obstacle(disk, parent, damaged)
    if (fallback !== undefined || !before) return { disk, kind: 'full', fallback: fallback ?? 'disk-new' }
    const backing = `../${parent.manifest.id}/${before.image}`
    return {
      disk,
      kind: 'incremental',
      since: markName(parent.manifest.id),
      parentSize: before.virtualSize,
      backing,
    }
  })
  return plans.some(({ kind }) => kind === 'incremental') ? { parent, disks: plans } : { disks: plans }
}

/** Why a disk cannot get an increment on a backup; undefined when it can. */
function obstacle(
  disk: HostDisk,
  { manifest }: StoredBackup,
  damaged: ReadonlySet<string>,
): FallbackReason | undefined {
  if (disk.format === 'raw') return 'format-raw'
  if (disk.format === 'qcow2' && disk.readOnly) return 'disk-readonly'
  if (disk.format === 'qcow2' && !disk.holdsBitmaps) return 'format-qcow2-v2'
  const before = manifest.disks.find(({ name }) => name === disk.name)
  if (!before) return 'disk-new'
  if (isFileDisk(disk) !== (before.format === 'qcow2')) return 'disk-replaced'
  const reason = isFileDisk(disk)
    ? bitmapObstacle(disk, before, markName(manifest.id))
    : snapshotObstacle(disk, before, manifest.id)
  const isMissing = reason === 'bitmap-missing' || reason === 'snapshot-missing'
  const isOfDamaged = () => marksOf(disk).some(name => damaged.has(backupOfMark(name) ?? ''))
  return isMissing && isOfDamaged() ? 'parent-broken' : reason
}

function bitmapObstacle(disk: FileDisk, before: ManifestDisk, name: string): FallbackReason | undefined {
  const bitmap = disk.bitmaps.find(bitmap => bitmap.name === name)
  if (!bitmap || bitmap.twin === 'alone' || before.format !== 'qcow2' || !before.bitmap)
    return 'bitmap-missing'
  // On another file the bitmap need not tell of every write: libvirt puts an empty copy of it into the overlay of a
  // snapshot that somebody takes. And it may be that of another disk of the backup, whose file has this one's name by now.
  if (disk.path !== before.source.path || bitmap.twin === 'foreign') return 'disk-replaced'
  if (bitmap.inconsistent) return 'bitmap-inconsistent'
  if (!bitmap.enabled) return 'bitmap-disabled'
  if (bitmap.granularity !== before.bitmap.granularity) return 'bitmap-granularity'
  if (disk.virtualSize < before.virtualSize) return 'disk-shrunk' // which also cuts bitmaps
  if (bitmap.twin !== 'agrees') return 'bitmap-altered'
  return undefined
}

/**
 * Why an RBD image has not the snapshot that a backup shows; undefined when it has. Names can be given again, numbers
 * cannot: a snapshot is that of the backup by its number in the very image.
 */
export function snapshotObstacle(
  disk: RbdDisk,
  before: ManifestDisk,
  backupId: string,
): FallbackReason | undefined {
  const { state } = disk
  const snapshot = state.snapshots.find(({ name }) => name === markName(backupId))
  if (before.format !== 'rbd-diff') return 'disk-replaced'
  const restored = state.metadata.get(restoredKey(backupId, before.name))
  if (restored === undefined && state.id !== before.source.imageId) return 'disk-replaced'
  if (!snapshot) return 'snapshot-missing'
  const isOriginal = state.id === before.source.imageId && snapshot.id === before.snapshot.id
  return isOriginal || restored === String(snapshot.id) ? undefined : 'snapshot-replaced'
}

/** The names of a disk's bitmaps, or snapshots. */
function marksOf(disk: HostDisk): string[] {
  const marks = isFileDisk(disk) ? disk.bitmaps : disk.state.snapshots
  return marks.map(({ name }) => name)
}

/**
 * Of the backups that went to a storage, those that it has nothing of any more: they were deleted, and their marks serve
 * nothing. A storage without any backup of the instance tells nothing: what belongs there may not be mounted.
 */
export function goneBackups(went: readonly string[], { backups, objects }: Catalog): ReadonlySet<string> {
  if (backups.length === 0) return new Set()
  const there = new Set([...objects.keys()].map(key => backupOfKey(key)?.backup))
  return new Set(went.filter(id => !there.has(id)))
}

/** The marks of some backups that a disk carries. */
export function marksOfBackups(disk: HostDisk, backups: ReadonlySet<string>): string[] {
  return marksOf(disk).filter(name => backups.has(backupOfMark(name) ?? ''))
}

/**
 * The bitmaps that a finished backup replaces: of each disk, those of other backups on the same storage, and those of
 * backups that are gone from it.
 */
export function bitmapsToRetire(
  disks: readonly HostDisk[],
  backups: readonly StoredBackup[],
  newId: string,
  gone: ReadonlySet<string> = new Set(),
): Record<string, string[]> {
  return Object.fromEntries(
    disks
      .filter(isFileDisk)
      .map(disk => [disk.name, [...marksOfBackups(disk, gone), ...marksOfOthers(disk, backups, newId)]]),
  )
}

/**
 * The snapshots that a finished backup replaces: of each RBD disk, those of the same storage but the newest `keep`, and
 * those of backups that are gone from it.
 */
export function snapshotsToRetire(
  disks: readonly HostDisk[],
  backups: readonly StoredBackup[],
  newId: string,
  keep: number,
  gone: ReadonlySet<string> = new Set(),
): Record<string, string[]> {
  const rbdDisks = disks.filter(disk => !isFileDisk(disk))
  return Object.fromEntries(
    rbdDisks.map(disk => {
      const old = marksOfOthers(disk, backups, newId).sort() // by time: ids sort so
      const replaced = old.slice(0, Math.max(0, old.length - (keep - 1)))
      return [disk.name, [...marksOfBackups(disk, gone), ...replaced]]
    }),
  )
}

function marksOfOthers(disk: HostDisk, backups: readonly StoredBackup[], newId: string): string[] {
  const known = new Set(backups.map(({ manifest }) => manifest.id))
  return marksOfBackups(disk, known).filter(name => name !== markName(newId))
}

/** One sentence for a fallback. */
export function fallbackMessage(disk: string, reason: FallbackReason): string {
  const why: Record<FallbackReason, string> = {
    'no-parent': 'No backup to build on, taking a full backup',
    'chain-limit': 'The chain has reached its length, starting a new one with a full backup',
    'parent-broken': 'The parent backup is not whole on the storage, falling back to full backup',
    'disk-new': 'The disk is not in the parent backup, falling back to full backup',
    'disk-replaced':
      'The disk is another one, or on another file, than at the parent backup, falling back to full backup',
    'disk-shrunk': 'The disk is smaller than in the parent backup, falling back to full backup',
    'disk-readonly': 'QEMU keeps no bitmap of a disk that is read-only, taking a full backup',
    'format-raw': 'A raw disk holds no bitmap, taking a full backup',
    'format-qcow2-v2': 'A qcow2 image of version 2 holds no bitmap, taking a full backup',
    'bitmap-missing': 'Bitmap not found, falling back to full backup',
    'bitmap-inconsistent':
      'Bitmap is inconsistent since QEMU did not end cleanly, falling back to full backup',
    'bitmap-disabled': 'Bitmap was disabled, falling back to full backup',
    'bitmap-altered':
      'Bitmap does not show all writes since the parent (somebody cleared it or made it anew), falling back to full backup',
    'bitmap-granularity': 'Bitmap has another granularity, falling back to full backup',
    'snapshot-missing': 'RBD snapshot of the parent not found, falling back to full backup',
    'snapshot-replaced': 'The RBD snapshot is not the one of the parent, falling back to full backup',
  }
  return `${why[reason]} (disk ${disk}).`
}
