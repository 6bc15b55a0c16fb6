import { hasManifest, locateBackup, readCatalog, type StoredBackup } from './backups.ts'
import { chainOf, dependentsOf, indexChains } from './chain.ts'
import { VarveError } from './errors.ts'
import { DEFAULT_GARBAGE_AGE_MS, isStillGarbage } from './garbage.ts'
import { removeBackup } from './remove-backup.ts'
import type { StorageDriver } from './storage.ts'

/**
 * Removes one backup, unless another rests on it, and returns what it was as far as that can be read. See `ChainManager.delete`.
 *
 * @param running the ids of backups that are not settled
 */
export async function deleteBackup(
  storage: StorageDriver,
  id: string,
  running: ReadonlySet<string>,
  signal: AbortSignal,
): Promise<StoredBackup | undefined> {
  const located = await locateBackup(storage, id, signal)
  const { folder, chain } = located
  const children = dependentsOf(folder, indexChains(chain))
  if (children.length > 0) throw chainDependency(id, children)
  if (!hasManifest(located)) await assertLeftover(storage, id, folder, running, signal)
  if (await removeBackup(storage, folder, chain.objects, signal))
    return chain.backups.find(backup => backup.folder === folder)
  const now = await readCatalog(storage, `${chainOf(folder)}/`, signal)
  throw chainDependency(id, dependentsOf(folder, indexChains(now)))
}

/** A folder without a manifest is no backup: it is being written now, or it was left over. */
async function assertLeftover(
  storage: StorageDriver,
  id: string,
  folder: string,
  running: ReadonlySet<string>,
  signal: AbortSignal,
): Promise<void> {
  if (!running.has(id) && (await isStillGarbage(storage, folder, DEFAULT_GARBAGE_AGE_MS, signal))) return
  throw new VarveError(
    'BACKUP_NOT_FOUND',
    `${id} is no backup: its folder ${folder} on ${storage.location} has no manifest. It is being written now, or was left over by a run or a deletion that broke off; then it can be removed after 24 hours, and once "varve recover" has settled that run.`,
    { context: { backup: id, folder, location: storage.location } },
  )
}

function chainDependency(id: string, children: readonly string[]): VarveError {
  return new VarveError(
    'CHAIN_DEPENDENCY',
    `Backup ${id} cannot be deleted: others rest on it. Delete them first, in this order: ${children.join(', ')}.`,
    { context: { backup: id, children } },
  )
}
