import { isBackupId } from './backup-id.ts'
import { isVarveError, VarveError } from './errors.ts'
import { fanOut } from './fan-out.ts'
import { loadObject } from './load-object.ts'
import { type BackupManifest, MANIFEST_MAX_BYTES, parseManifest } from './manifest.ts'
import type { CallOptions, StorageDriver, StoredObject } from './storage.ts'
import { backupOfKey, instanceFolder, MANIFEST_FILE, parseManifestKey } from './storage-layout.ts'
import { tellCommands } from './tell-commands.ts'

/** Manifests that are read at the same time. */
const MANIFESTS_AT_ONCE = 8

const never: AbortSignal = new AbortController().signal

/** A backup on a storage. */
export interface StoredBackup {
  /** What it is. */
  readonly manifest: BackupManifest
  /** Where its objects are: `<instance>/<chain>/<id>`. */
  readonly folder: string
}

/** A manifest on a storage that cannot be used. */
export interface DamagedManifest {
  /** Where it is. */
  readonly key: string
  /** MANIFEST_INVALID or MANIFEST_VERSION. */
  readonly error: VarveError
}

/** The backups that a storage holds. */
export interface BackupListing {
  /** Oldest first. */
  readonly backups: StoredBackup[]
  /** What is there but cannot be read as a backup, by key. */
  readonly damaged: DamagedManifest[]
}

/** Everything under a prefix of a storage: the backups, and every object with its size. */
export interface Catalog extends BackupListing {
  /** By key. */
  readonly objects: ReadonlyMap<string, StoredObject>
}

/** Which backups are meant. */
export interface FindOptions extends CallOptions {
  /** Only those of this instance. Default: of any. */
  instance?: string
}

/** The backups on a storage. Damaged manifests are told of, not thrown; a storage that fails is thrown. */
export async function listBackups(storage: StorageDriver, options: FindOptions = {}): Promise<BackupListing> {
  const told = tellCommands(storage, options.onCommand)
  const { backups, damaged } = await readCatalog(told, prefixOf(options), options.signal)
  return { backups, damaged }
}

/**
 * The backup of an id.
 *
 * @throws INVALID_ARGUMENT for what is no id
 * @throws BACKUP_NOT_FOUND
 * @throws MANIFEST_INVALID, MANIFEST_VERSION where its manifest cannot be used, or two folders have one of this id
 */
export async function findBackup(
  storage: StorageDriver,
  id: string,
  options: FindOptions = {},
): Promise<StoredBackup> {
  assertBackupId(id)
  const { signal = never } = options
  const told = tellCommands(storage, options.onCommand)
  const backups: StoredBackup[] = []
  let damage: VarveError | undefined
  for (const object of (await listObjects(told, prefixOf(options), signal)).values()) {
    if (parseManifestKey(object.key)?.backup !== id) continue
    const found = await readBackup(told, object, signal)
    if (found && !('error' in found)) backups.push(found)
    else damage ??= found?.error // a copy of the backup in another folder does not hide the real one
  }
  const [backup, second] = backups
  if (backup && second) throw sameId(id, [backup.folder, second.folder])
  if (!backup) throw damage ?? backupNotFound(storage, id)
  return backup
}

/** Everything under a prefix of a storage. Backups of one id are damaged, all of them: at most one is Varve's. */
export async function readCatalog(
  storage: StorageDriver,
  prefix: string,
  signal: AbortSignal = never,
): Promise<Catalog> {
  const objects = await listObjects(storage, prefix, signal)
  const manifests = [...objects.values()].filter(({ key }) => parseManifestKey(key))
  const read = await fanOut(manifests, { concurrency: MANIFESTS_AT_ONCE, signal }, (object, signal) =>
    readBackup(storage, object, signal),
  )
  const whole: StoredBackup[] = []
  const damaged: DamagedManifest[] = []
  for (const entry of read) {
    if (entry === undefined) continue
    if ('error' in entry) damaged.push(entry)
    else whole.push(entry)
  }
  const backups: StoredBackup[] = []
  for (const [id, ofId] of Map.groupBy(whole, ({ manifest }) => manifest.id)) {
    if (ofId.length === 1) backups.push(...ofId)
    else
      for (const { folder } of ofId) {
        const error = sameId(
          id,
          ofId.map(backup => backup.folder),
        )
        damaged.push({ key: `${folder}/${MANIFEST_FILE}`, error })
      }
  }
  backups.sort((a, b) => compareText(a.manifest.id, b.manifest.id))
  damaged.sort((a, b) => compareText(a.key, b.key))
  return { backups, damaged, objects }
}

/** Where a backup is, and everything in its chain. */
export interface LocatedBackup {
  readonly folder: string
  readonly chain: Catalog
}

/**
 * Where a backup is, whatever its state: its manifest may be damaged or, in a folder that was left over, gone.
 * A copy of it in a folder that is not its own does not hide the real one.
 *
 * @throws INVALID_ARGUMENT for what is no id
 * @throws BACKUP_NOT_FOUND
 * @throws MANIFEST_INVALID where two folders have one of this id
 */
export async function locateBackup(
  storage: StorageDriver,
  id: string,
  signal: AbortSignal,
): Promise<LocatedBackup> {
  assertBackupId(id)
  const objects = await listObjects(storage, '', signal)
  const places = [...objects.keys()].map(backupOfKey).filter(place => place?.backup === id)
  let located: LocatedBackup | undefined
  let other: LocatedBackup | undefined
  for (const folder of new Set(places.flatMap(place => place?.folder ?? []))) {
    const chain = await readCatalog(storage, folder.slice(0, -id.length), signal)
    if (!chain.backups.some(backup => backup.folder === folder)) other ??= { folder, chain }
    else if (located) throw sameId(id, [located.folder, folder])
    else located = { folder, chain }
  }
  const found = located ?? other
  if (!found) throw backupNotFound(storage, id)
  return found
}

/** Whether the located folder holds a manifest, be it a damaged one. */
export function hasManifest({ folder, chain }: LocatedBackup): boolean {
  return chain.objects.has(`${folder}/${MANIFEST_FILE}`)
}

/** The error for a backup that a storage does not hold. */
export function backupNotFound(storage: StorageDriver, id: string): VarveError {
  const { location } = storage
  const message = `There is no backup ${id} on ${location}. List the backups that are there.`
  return new VarveError('BACKUP_NOT_FOUND', message, { context: { backup: id, location } })
}

/** A manifest's backup, or what is wrong with it; undefined where it was deleted since it was listed. */
async function readBackup(
  storage: StorageDriver,
  { key, size }: StoredObject,
  signal: AbortSignal,
): Promise<StoredBackup | DamagedManifest | undefined> {
  try {
    // One byte more than is allowed is enough for the parser to refuse it.
    const range = { start: 0, end: Math.min(size, MANIFEST_MAX_BYTES + 1) }
    const bytes = await loadObject({ storage, key, range, signal })
    return { manifest: parseManifest(bytes, { key }), folder: key.slice(0, -MANIFEST_FILE.length - 1) }
  } catch (error) {
    if (isVarveError(error, 'OBJECT_NOT_FOUND')) return undefined
    if (isVarveError(error, 'MANIFEST_INVALID') || isVarveError(error, 'MANIFEST_VERSION')) {
      return { key, error }
    }
    throw error
  }
}

/** Ids are random: two backups of one were made by somebody else, who may want one to be taken for the other. */
function sameId(id: string, folders: readonly string[]): VarveError {
  const message = `There are ${folders.length} backups of the id ${id}, in ${folders.join(' and ')}. At most one of them is Varve's: look at them, and move the others away from the storage.`
  return new VarveError('MANIFEST_INVALID', message, { context: { backup: id, folders } })
}

function assertBackupId(id: string): void {
  if (isBackupId(id)) return
  throw new VarveError(
    'INVALID_ARGUMENT',
    `Not a backup id: ${JSON.stringify(id)}. An id reads like 20261123-231543-123-9f3a1c.`,
    { context: { id } },
  )
}

async function listObjects(
  storage: StorageDriver,
  prefix: string,
  signal: AbortSignal,
): Promise<Map<string, StoredObject>> {
  const objects = new Map<string, StoredObject>()
  for await (const object of storage.list(prefix, { signal })) objects.set(object.key, object)
  return objects
}

function prefixOf({ instance }: FindOptions): string {
  return instance === undefined ? '' : `${instanceFolder(instance)}/`
}

function compareText(a: string, b: string): number {
  return a < b ? -1 : a > b ? 1 : 0
}
