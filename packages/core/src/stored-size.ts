import { VarveError } from './errors.ts'
import type { StorageDriver } from './storage.ts'

/** Refuses an object that is gone (`OBJECT_NOT_FOUND`) or not of the recorded size (`SIZE_MISMATCH`). */
export async function assertStoredSize(
  storage: StorageDriver,
  key: string,
  size: number,
  signal: AbortSignal,
): Promise<void> {
  const stored = await storage.stat(key, { signal })
  if (!stored) {
    throw new VarveError(
      'OBJECT_NOT_FOUND',
      `${key} is gone from ${storage.location}. Restore another backup.`,
      {
        context: { key, location: storage.location },
      },
    )
  }
  if (stored.size !== size) {
    throw new VarveError(
      'SIZE_MISMATCH',
      `${key} has ${stored.size} bytes instead of ${size}: it is damaged. Restore another backup.`,
      { context: { key, size: stored.size, expected: size } },
    )
  }
}
