import { randomBytes } from 'node:crypto'
import { chainOf } from './chain.ts'
import { removeFolder } from './remove-folder.ts'
import { bytesBody, type CallOptions, type StorageDriver, type StoredObject } from './storage.ts'
import { DELETION_PREFIX, MANIFEST_FILE, parseManifestKey } from './storage-layout.ts'

/**
 * Removes a backup, unless one was published in its chain since that was read, which may rest on it. Another
 * machine may publish at this very moment. So a mark is stored first, and only then looked for new manifests; who
 * publishes stores the manifest first, and only then looks for the mark. Whatever the order, one of the two sees the
 * other and gives way, and at no time is a backup without what it rests on. A mark that was left by a deletion which
 * was cut short keeps increments off the backup until it is deleted.
 *
 * @param known the objects of the chain when it was read
 * @returns whether it was removed
 */
export async function removeBackup(
  storage: StorageDriver,
  folder: string,
  known: ReadonlyMap<string, StoredObject>,
  signal: AbortSignal,
): Promise<boolean> {
  if (known.has(`${folder}/${MANIFEST_FILE}`)) {
    const mark = `${folder}/${DELETION_PREFIX}${randomBytes(4).toString('hex')}`
    await storage.put(mark, bytesBody(new Uint8Array()), { signal })
    if (await hasNewBackup(storage, chainOf(folder), known, signal)) {
      await storage.delete(mark, { signal })
      return false
    }
  }
  await removeFolder(storage, folder, signal)
  return true
}

/** Whether somebody is deleting a backup, or was when it was cut short. */
export async function isBeingDeleted(
  storage: StorageDriver,
  folder: string,
  options: CallOptions = {},
): Promise<boolean> {
  for await (const _ of storage.list(`${folder}/${DELETION_PREFIX}`, options)) return true
  return false
}

async function hasNewBackup(
  storage: StorageDriver,
  chain: string,
  known: ReadonlyMap<string, StoredObject>,
  signal: AbortSignal,
): Promise<boolean> {
  for await (const { key } of storage.list(`${chain}/`, { signal })) {
    if (parseManifestKey(key) && !known.has(key)) return true
  }
  return false
}
