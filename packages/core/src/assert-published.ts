import { VarveError } from './errors.ts'
import type { JournalStepOf } from './journal.ts'
import { loadRecorded } from './load-object.ts'
import { isBeingDeleted } from './remove-backup.ts'
import type { StorageDriver } from './storage.ts'
import { MANIFEST_FILE } from './storage-layout.ts'
import { verifySize } from './verify-upload.ts'

/**
 * Looks whether a manifest that was written makes a backup: it has to be read back as it was written, and what the backup
 * rests on has to be there. Nothing is left out for speed: it is small, and all else rests on it.
 *
 * @throws SIZE_MISMATCH also where there is no manifest, DIGEST_MISMATCH, PARENT_MISSING
 */
export async function assertPublished(
  storage: StorageDriver,
  { manifest: key, size, blake3, parent }: Omit<JournalStepOf<'publish'>, 'step'>,
  signal: AbortSignal,
): Promise<void> {
  await verifySize(storage, { key, size }, signal)
  const remedy = 'Nothing was published; look at the storage before the next backup.'
  await loadRecorded({ storage, key, size, blake3, signal, remedy })
  if (parent !== undefined) await assertParent(storage, parent, signal) // see removeBackup
}

/** Looks whether a backup that another rests on is there, by its folder. @throws PARENT_MISSING */
export async function assertParent(
  storage: StorageDriver,
  folder: string,
  signal: AbortSignal,
): Promise<void> {
  // In this order: a deletion takes the manifest away before its mark, so that between the two looks it cannot go unseen.
  const isGoing = await isBeingDeleted(storage, folder, { signal })
  const isThere = await storage.stat(`${folder}/${MANIFEST_FILE}`, { signal })
  if (isThere && !isGoing) return
  const id = folder.slice(folder.lastIndexOf('/') + 1)
  throw new VarveError(
    'PARENT_MISSING',
    `The backup ${id} that this one rests on was deleted during the upload. Nothing was published; back up again.`,
    { context: { parent: id }, retryable: true },
  )
}
