import type { BackupListing, StoredBackup } from './backups.ts'
import { blockListBytes } from './block-list.ts'
import { VarveError } from './errors.ts'
import type { BackupManifest, ManifestDisk, ManifestFile } from './manifest.ts'
import type { StoredObject } from './storage.ts'

/** Backups and damaged manifests by their folder. */
export interface ChainIndex {
  readonly backups: ReadonlyMap<string, StoredBackup>
  readonly damaged: ReadonlyMap<string, VarveError>
}

/** A backup and what it rests on, as far as it is there. */
export interface ChainWalk {
  /** The full backup first; without the links from the first problem on. */
  readonly links: StoredBackup[]
  /** Why the walk did not come to a full backup. */
  readonly problem?: VarveError
}

/** Makes the backups of a listing ready for {@link walkChain}. */
export function indexChains({ backups, damaged }: BackupListing): ChainIndex {
  return {
    backups: new Map(backups.map(backup => [backup.folder, backup])),
    damaged: new Map(damaged.map(({ key, error }) => [folderOf(key), error])),
  }
}

/**
 * Goes from a backup to its parent and so on to the full one. Every parent is in a sibling folder, so no
 * chain leads into another instance or chain; parents are older than their children, so none is a circle.
 */
export function walkChain(folder: string, index: ChainIndex): ChainWalk {
  const links: StoredBackup[] = []
  const damage = index.damaged.get(folder)
  if (damage) return { links, problem: damage }
  const newest = index.backups.get(folder)
  if (!newest) return { links, problem: chainBroken(folder, missingLink(folder, undefined)) }
  links.push(newest)
  for (let at = newest; at.manifest.parent !== undefined; ) {
    const link = linkBelow(at, at.manifest.parent, index)
    if ('what' in link) return { links: links.toReversed(), problem: chainBroken(folder, link) }
    links.push(link)
    at = link
  }
  return { links: links.toReversed() }
}

/** The backups that do not lead to a full one, by folder: what {@link walkChain} says of each, in one pass over all. */
export function brokenChains(index: ChainIndex): Map<string, VarveError> {
  const gaps = new Map<string, Gap>()
  const errors = new Map<string, VarveError>()
  // Parents come before their children in this order.
  for (const folder of [...index.backups.keys()].sort()) {
    const backup = index.backups.get(folder)
    if (backup?.manifest.parent === undefined) continue
    const link = linkBelow(backup, backup.manifest.parent, index)
    const gap = 'what' in link ? link : gaps.get(link.folder)
    if (!gap) continue
    gaps.set(folder, gap)
    errors.set(folder, chainBroken(folder, gap))
  }
  return errors
}

/**
 * The ids of the backups that rest on one, directly or not, newest first; for the index of its chain. A
 * damaged manifest does not tell its parent: it may rest on any older backup.
 */
export function dependentsOf(folder: string, { backups, damaged }: ChainIndex): string[] {
  const resting = new Set([folder])
  const restsOnIt = (at: string) => {
    const parent = backups.get(at)?.manifest.parent
    return parent === undefined ? damaged.has(at) && at > folder : resting.has(siblingFolder(at, parent))
  }
  // Parents come before their children in this order, so one pass reaches every descendant.
  for (const at of [...backups.keys(), ...damaged.keys()].sort()) if (restsOnIt(at)) resting.add(at)
  resting.delete(folder)
  return [...resting].map(idOf).reverse()
}

/** An object that a backup consists of, besides its manifest. */
export interface BackupObject {
  readonly key: string
  /** In bytes, as recorded. */
  readonly size: number
}

/** The objects that a backup consists of, besides its manifest. */
export function objectsOf({ manifest, folder }: StoredBackup): BackupObject[] {
  const images = manifest.disks.flatMap(disk => imageObjects(folder, disk))
  return [...images, ...fileObjects(folder, filesOf(manifest))]
}

/** The objects that a restore of a disk reads of one backup. */
export function objectsOfDisk(folder: string, disk: ManifestDisk): BackupObject[] {
  return [
    ...imageObjects(folder, disk),
    ...fileObjects(folder, disk.format === 'rbd-diff' ? [disk.index] : []),
  ]
}

/** The objects of small files of a backup. */
export function fileObjects(folder: string, files: readonly ManifestFile[]): BackupObject[] {
  return files.map(({ key, size }) => ({ key: `${folder}/${key}`, size }))
}

function imageObjects(folder: string, { image, storedSize, blocks, digest }: ManifestDisk): BackupObject[] {
  return [
    { key: `${folder}/${image}`, size: storedSize },
    { key: `${folder}/${blocks}`, size: blockListBytes(storedSize, digest) },
  ]
}

/** The small files of a backup: its definition, its UEFI variables, the indexes of RBD streams, the maps of disks. */
export function filesOf({ definition, nvram, disks }: BackupManifest): ManifestFile[] {
  const ofDisks = disks.map(disk => (disk.format === 'rbd-diff' ? disk.index : disk.map))
  return [definition, nvram, ...ofDisks].filter(file => file !== undefined)
}

/** What is wrong with objects of a backup, by default all, as far as their sizes tell: OBJECT_NOT_FOUND, SIZE_MISMATCH. */
export function missingObjects(
  backup: StoredBackup,
  objects: ReadonlyMap<string, StoredObject>,
  needed: readonly BackupObject[] = objectsOf(backup),
): VarveError[] {
  return needed.flatMap(({ key, size }) => {
    const stored = objects.get(key)
    if (stored?.size === size) return []
    const context = { backup: backup.manifest.id, key, expected: size, actual: stored?.size }
    return stored
      ? new VarveError(
          'SIZE_MISMATCH',
          `${key} has ${stored.size} bytes instead of ${size}: it is damaged. Put it back from a copy of the storage, or use another backup.`,
          { context },
        )
      : new VarveError(
          'OBJECT_NOT_FOUND',
          `${key} is gone. Put it back from a copy of the storage, or use another backup.`,
          { context },
        )
  })
}

/** The folder of the chain that a backup's folder is in. */
export function chainOf(folder: string): string {
  return folder.slice(0, folder.lastIndexOf('/'))
}

function idOf(folder: string): string {
  return folder.slice(folder.lastIndexOf('/') + 1)
}

function siblingFolder(folder: string, id: string): string {
  return `${chainOf(folder)}/${id}`
}

function folderOf(key: string): string {
  return key.slice(0, key.lastIndexOf('/'))
}

/** Where a chain ends before it comes to a full backup, and why. */
interface Gap {
  /** The folder of the link that is not fit. */
  readonly at: string
  readonly what: string
  readonly cause?: VarveError | undefined
}

function linkBelow(
  child: StoredBackup,
  parent: string,
  { backups, damaged }: ChainIndex,
): StoredBackup | Gap {
  const at = siblingFolder(child.folder, parent)
  const backup = backups.get(at)
  return backup ? (unfitParent(child, backup) ?? backup) : missingLink(at, damaged.get(at))
}

function missingLink(at: string, damage: VarveError | undefined): Gap {
  const what = damage
    ? `the manifest of ${idOf(at)} cannot be used: ${damage.message}`
    : `${idOf(at)} is not on the storage, where it would be ${at}. Put it back from a copy, or use a backup that does not rest on it.`
  return { at, what, cause: damage }
}

/** Each increment's backing file is the image of the same disk in the parent. */
function unfitParent(child: StoredBackup, parent: StoredBackup): Gap | undefined {
  for (const disk of child.manifest.disks) {
    if (disk.kind === 'full') continue
    const base = parent.manifest.disks.find(({ name }) => name === disk.name)
    if (base && disk.backing === `../${parent.manifest.id}/${base.image}`) continue
    const what = `${parent.manifest.id} has no image ${disk.backing} that the disk ${disk.name} of ${child.manifest.id} rests on. Use a backup that does not rest on it.`
    return { at: parent.folder, what }
  }
  return undefined
}

function chainBroken(folder: string, { at, what, cause }: Gap): VarveError {
  const [backup, link] = [idOf(folder), idOf(at)]
  const message = `The chain of backup ${backup} is broken: ${what}`
  return new VarveError('CHAIN_BROKEN', message, { context: { backup, link }, cause })
}
