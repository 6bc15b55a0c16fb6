import type { Catalog, StoredBackup } from './backups.ts'
import {
  type BackupObject,
  chainOf,
  fileObjects,
  indexChains,
  missingObjects,
  objectsOfDisk,
  walkChain,
} from './chain.ts'
import { type DiskLayer, diskLayers } from './disk-chain.ts'
import { isVarveError } from './errors.ts'
import { assertLayersFit } from './open-layers.ts'
import { RESTORE_MEMORY } from './restore-disk.ts'

/** What a restore needs of a backup. */
export interface NeededOfBackup {
  /** The names of the disks. */
  readonly disks: readonly string[]
  /** Whether the definition and the UEFI variables are restored too. */
  readonly definition: boolean
}

/**
 * The chain of a backup, the oldest link that is there first, with every object that the restore reads there in its
 * recorded size. What is wrong with the rest of the chain is no matter: other disks, and links below a newer full image.
 *
 * @throws CHAIN_BROKEN, MANIFEST_INVALID, OBJECT_NOT_FOUND, SIZE_MISMATCH, and INVALID_ARGUMENT where the memory of this
 * machine does not suffice, which is known before an instance is shut down
 */
export function chainForRestore(
  backup: StoredBackup,
  catalog: Catalog,
  { disks, definition }: NeededOfBackup,
): StoredBackup[] {
  const index = indexChains(catalog)
  const chain = [backup]
  for (let at: StoredBackup | undefined = backup; at?.manifest.parent !== undefined; ) {
    at = index.backups.get(`${chainOf(at.folder)}/${at.manifest.parent}`)
    if (at) chain.unshift(at)
  }
  const ofDisks = disks.map(name => layersOf(name, chain, () => walkChain(backup.folder, index).problem))
  for (const layers of ofDisks) assertLayersFit({ layers, memory: RESTORE_MEMORY }) // one disk at a time
  const { definition: xml, nvram } = backup.manifest
  const files = definition ? [xml, nvram].filter(file => file !== undefined) : []
  const needed: [StoredBackup, BackupObject[]][] = [[backup, fileObjects(backup.folder, files)]]
  for (const { backup: link, disk } of ofDisks.flat()) needed.push([link, objectsOfDisk(link.folder, disk)])
  for (const [link, objects] of needed) {
    const [damage] = missingObjects(link, catalog.objects, objects)
    if (damage) throw damage
  }
  return chain
}

/** What a walk along the whole chain says of its gap tells more than that a layer is missing. */
function layersOf(
  name: string,
  chain: readonly StoredBackup[],
  problem: () => Error | undefined,
): DiskLayer[] {
  try {
    return diskLayers(chain, name)
  } catch (error) {
    throw isVarveError(error, 'DISK_NOT_FOUND') ? error : (problem() ?? error)
  }
}
