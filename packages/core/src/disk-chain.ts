import type { StoredBackup } from './backups.ts'
import { VarveError } from './errors.ts'
import type { BackupManifest, ManifestDisk } from './manifest.ts'

/** One layer of a disk: a backup and its image of the disk. */
export interface DiskLayer {
  readonly backup: StoredBackup
  readonly disk: ManifestDisk
}

/**
 * The layers of a disk in a chain, the newest first and a full image last. A backup that is incremental may
 * hold a full image of one disk, with which that disk's layers end. `chain` begins with the full backup and ends
 * with the one that is wanted.
 *
 * `DISK_NOT_FOUND` where the newest backup does not have the disk; `CHAIN_BROKEN` where a layer below it is
 * missing; `MANIFEST_INVALID` where an image is recorded to rest on another one than the next.
 */
export function diskLayers(chain: readonly StoredBackup[], name: string): DiskLayer[] {
  const newest = chain.at(-1)
  if (!newest) throw new VarveError('INVALID_ARGUMENT', 'A chain has at least one backup.')
  const layers: DiskLayer[] = []
  let wanted: string | undefined = newest.manifest.id
  for (const backup of chain.toReversed()) {
    const { id, parent, disks } = backup.manifest
    const above = layers.at(-1)
    const disk = disks.find(candidate => candidate.name === name)
    if (!disk && !above) throw diskNotFound(newest.manifest, name)
    if (!disk || id !== wanted) break
    const layer = { backup, disk }
    if (above) checkBacking(above, layer)
    layers.push(layer)
    if (disk.kind === 'full') {
      checkBacking(layer, undefined)
      return layers
    }
    wanted = parent
  }
  const lowest = layers.at(-1)?.backup.manifest
  throw new VarveError(
    'CHAIN_BROKEN',
    `Backup ${newest.manifest.id} cannot be restored: the image of ${name} in ${lowest?.id} rests on backup ${lowest?.parent}, which has none in this chain. Restore an older or a newer backup.`,
    { context: { backup: newest.manifest.id, disk: name, missing: lowest?.parent } },
  )
}

/** An image rests on the one below it by its relative path, as every qcow2 tool follows it; a full one on none. */
function checkBacking({ backup, disk }: DiskLayer, below: DiskLayer | undefined): void {
  const expected = below && `../${below.backup.manifest.id}/${below.disk.image}`
  if (disk.backing === expected) return
  const { id } = backup.manifest
  throw new VarveError(
    'MANIFEST_INVALID',
    `The manifest of backup ${id} says that ${disk.image} rests on ${disk.backing ?? 'nothing'} instead of ${expected ?? 'nothing'}. Restore another backup.`,
    { context: { backup: id, disk: disk.name, backing: disk.backing, expected } },
  )
}

function diskNotFound(manifest: BackupManifest, name: string): VarveError {
  const disks = manifest.disks.map(disk => disk.name)
  return new VarveError(
    'DISK_NOT_FOUND',
    `Backup ${manifest.id} has no disk ${name}. It has ${disks.join(', ')}.`,
    { context: { backup: manifest.id, disk: name, disks } },
  )
}
