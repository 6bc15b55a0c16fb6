import { backupTime } from './backup-id.ts'
import type { Catalog } from './backups.ts'
import { VarveError } from './errors.ts'
import type { StorageDriver, StoredObject } from './storage.ts'
import { backupOfKey, MANIFEST_FILE } from './storage-layout.ts'

/** How long nothing was written to a folder without a manifest before it is garbage: one day, in milliseconds. */
export const DEFAULT_GARBAGE_AGE_MS: number = 24 * 60 * 60 * 1000

const LEAST_GARBAGE_AGE_MS = 60 * 60 * 1000

/** A backup's folder without a manifest: an upload that broke off, or a deletion that did. */
export interface GarbageFolder {
  /** `<instance>/<chain>/<id>` */
  readonly folder: string
  /** Objects in it. */
  readonly objects: number
  /** Their bytes. */
  readonly bytes: number
}

/** Refuses an age that is too short to tell a dead upload from one under way. */
export function assertGarbageAge(garbageAgeMs: number): void {
  if (Number.isFinite(garbageAgeMs) && garbageAgeMs >= LEAST_GARBAGE_AGE_MS) return
  throw new VarveError(
    'INVALID_ARGUMENT',
    `The age of garbage is ${garbageAgeMs} ms; it is at least one hour (${LEAST_GARBAGE_AGE_MS} ms), and above the time that the longest backup takes.`,
    { context: { garbageAgeMs } },
  )
}

/** The folders without a manifest in which nothing was written for `garbageAgeMs`. */
export function findGarbage({ objects }: Pick<Catalog, 'objects'>, garbageAgeMs: number): GarbageFolder[] {
  const folders = Map.groupBy(objects.values(), ({ key }) => backupOfKey(key)?.folder)
  return [...folders].flatMap(([folder, within]) =>
    folder !== undefined && isGarbage(folder, within, garbageAgeMs) ? [measure(folder, within)] : [],
  )
}

/**
 * Looks at a folder again, right before its removal: whether it is garbage still. Its manifest is asked for
 * by key as well, so that a listing which leaves something out costs no backup.
 */
export async function isStillGarbage(
  storage: StorageDriver,
  folder: string,
  garbageAgeMs: number,
  signal: AbortSignal,
): Promise<boolean> {
  if (await storage.stat(`${folder}/${MANIFEST_FILE}`, { signal })) return false
  const within: StoredObject[] = []
  for await (const object of storage.list(`${folder}/`, { signal })) within.push(object)
  return isGarbage(folder, within, garbageAgeMs)
}

function isGarbage(folder: string, within: readonly StoredObject[], garbageAgeMs: number): boolean {
  if (within.some(({ key }) => key === `${folder}/${MANIFEST_FILE}`)) return false
  const now = Date.now()
  // The id tells when the backup began, also where the storage tells no times or its clock is wrong; but not one from a clock
  // that was ahead, or that follows such an id.
  const began = backupTime(folder.slice(folder.lastIndexOf('/') + 1)).getTime()
  const lastWrite = within.reduce(
    (latest, { modifiedAt }) => Math.max(latest, modifiedAt?.getTime() ?? began),
    began > now ? 0 : began,
  )
  return now - lastWrite > garbageAgeMs
}

function measure(folder: string, within: readonly StoredObject[]): GarbageFolder {
  const bytes = within.reduce((sum, { size }) => sum + size, 0)
  return { folder, objects: within.length, bytes }
}
