import type { BackupListing, StoredBackup } from './backups.ts'
import { DIGEST_LENGTH } from './digest.ts'
import { VarveError } from './errors.ts'
import type { BackupManifest, ManifestFile } from './manifest.ts'
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
  for (let at = folder; ; ) {
    const child = links[0]
    const backup = index.backups.get(at)
    if (!backup) return { links, problem: missingLink(folder, at, index.damaged.get(at)) }
    const problem = child && unfitParent(child, backup)
    if (problem) return { links, problem }
    links.unshift(backup)
    const { parent } = backup.manifest
    if (parent === undefined) return { links }
    at = siblingFolder(backup.folder, parent)
  }
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
  const disks = manifest.disks.flatMap(({ image, storedSize, blocks, digest }) => [
    { key: `${folder}/${image}`, size: storedSize },
    { key: `${folder}/${blocks}`, size: Math.ceil(storedSize / digest.blockSize) * DIGEST_LENGTH },
  ])
  const files = filesOf(manifest).map(file => ({ key: `${folder}/${file.key}`, size: file.size }))
  return [...disks, ...files]
}

/** The small files of a backup: its definition, its UEFI variables, the indexes of RBD streams, the maps of disks. */
export function filesOf({ definition, nvram, disks }: BackupManifest): ManifestFile[] {
  const ofDisks = disks.map(disk => (disk.format === 'rbd-diff' ? disk.index : disk.map))
  return [definition, nvram, ...ofDisks].filter(file => file !== undefined)
}

/** What is wrong with the objects of a backup as far as their sizes tell: OBJECT_NOT_FOUND, SIZE_MISMATCH. */
export function missingObjects(
  backup: StoredBackup,
  objects: ReadonlyMap<string, StoredObject>,
): VarveError[] {
  return objectsOf(backup).flatMap(({ key, size }) => {
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

function missingLink(folder: string, at: string, damage: VarveError | undefined): VarveError {
  if (damage && at === folder) return damage
  const what = damage
    ? `the manifest of ${idOf(at)} cannot be used: ${damage.message}`
    : `${idOf(at)} is not on the storage, where it would be ${at}. Put it back from a copy, or use a backup that does not rest on it.`
  return chainBroken(idOf(folder), idOf(at), what, damage)
}

/** Each increment's backing file is the image of the same disk in the parent. */
function unfitParent(child: StoredBackup, parent: StoredBackup): VarveError | undefined {
  for (const disk of child.manifest.disks) {
    if (disk.kind === 'full') continue
    const base = parent.manifest.disks.find(({ name }) => name === disk.name)
    if (base && disk.backing === `../${parent.manifest.id}/${base.image}`) continue
    const what = `${parent.manifest.id} has no image ${disk.backing} that the disk ${disk.name} of ${child.manifest.id} rests on. Use a backup that does not rest on it.`
    return chainBroken(child.manifest.id, parent.manifest.id, what)
  }
  return undefined
}

function chainBroken(backup: string, link: string, what: string, cause?: unknown): VarveError {
  const message = `The chain of backup ${backup} is broken: ${what}`
  return new VarveError('CHAIN_BROKEN', message, { context: { backup, link }, cause })
}
