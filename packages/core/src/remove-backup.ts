import { chainOf } from './chain.ts'
import { loadObject } from './load-object.ts'
import { removeFolder } from './remove-folder.ts'
import { bytesBody, type StorageDriver, type StoredObject } from './storage.ts'
import { MANIFEST_FILE, parseManifestKey } from './storage-layout.ts'

/**
 * Removes a backup, unless one was published in its chain since that was read, which may rest on it. Another
 * machine may publish at this very moment. So the manifest goes first and is put back where a new one is seen
 * after that, and who publishes looks for the parent's manifest once more after its own is there: whatever
 * the order, one of the two sees the other.
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
  const key = `${folder}/${MANIFEST_FILE}`
  const manifest = known.get(key)
  if (manifest) {
    if (await hasNewBackup(storage, chainOf(folder), known, signal)) return false
    const range = { start: 0, end: manifest.size }
    const bytes = await loadObject({ storage, key, range, signal })
    await storage.delete(key, { signal })
    if (await hasNewBackup(storage, chainOf(folder), known, signal)) {
      await storage.put(key, bytesBody(bytes), { signal })
      return false
    }
  }
  await removeFolder(storage, folder, signal)
  return true
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
