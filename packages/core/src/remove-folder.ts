import type { StorageDriver } from './storage.ts'
import { MANIFEST_FILE } from './storage-layout.ts'

/**
 * Removes a backup: its manifest first, which ends the backup, then everything else in its folder. Cut short
 * it leaves a folder without a manifest, which is garbage. What is gone already is no error.
 */
export async function removeFolder(
  storage: StorageDriver,
  folder: string,
  signal: AbortSignal,
): Promise<void> {
  await storage.delete(`${folder}/${MANIFEST_FILE}`, { signal })
  const keys: string[] = []
  for await (const { key } of storage.list(`${folder}/`, { signal }))
    if (key.startsWith(`${folder}/`)) keys.push(key)
  for (const key of keys) {
    await storage.delete(key, { signal })
  }
}
