import { isBackupId } from './backup-id.ts'
import { VarveError } from './errors.ts'

/** The file name of a backup's record. */
export const MANIFEST_FILE = 'manifest.json'

/** What the file names of the marks begin with that a backup is being deleted, one of each who does; see `removeBackup`. */
export const DELETION_PREFIX = 'deleting-'

/**
 * The folder name of an instance: its name, with every byte outside `A-Z a-z 0-9 _ -` and inner dots
 * percent-encoded, so that any name is one safe, reversible path part.
 *
 * @throws INVALID_ARGUMENT for a name that is empty, over 80 bytes of UTF-8, no valid Unicode, or that holds
 * control characters
 */
export function instanceFolder(instance: string): string {
  if (!isInstanceName(instance)) {
    throw new VarveError(
      'INVALID_ARGUMENT',
      `Not an instance name: ${JSON.stringify(instance)}. It needs 1 to 80 bytes, without control characters.`,
      { context: { instance } },
    )
  }
  const encoded = Array.from(Buffer.from(instance), byte => {
    const char = String.fromCharCode(byte)
    return /[A-Za-z0-9_.-]/.test(char) ? char : `%${byte.toString(16).toUpperCase().padStart(2, '0')}`
  }).join('')
  return encoded.replace(/^\.|\.$/g, '%2E') // a folder `..`, and one ending in a dot on SMB, is another one
}

/** Whether an instance can have this name. */
export function isInstanceName(text: string): boolean {
  return text !== '' && Buffer.byteLength(text) <= 80 && text.isWellFormed() && !/\p{Cc}/u.test(text)
}

/** The instance of a folder name, or undefined where no instance has that folder. */
export function instanceOfFolder(folder: string): string | undefined {
  try {
    const instance = decodeURIComponent(folder)
    return instanceFolder(instance) === folder ? instance : undefined
  } catch {
    return undefined // not percent-encoded UTF-8, so not ours
  }
}

/** The folder of a backup: `<instance>/<chain>/<backup>`. Refuses ids that are not of Varve's form. */
export function backupFolder(instance: string, chain: string, backup: string): string {
  for (const id of [chain, backup]) {
    if (!isBackupId(id))
      throw new VarveError('INVALID_ARGUMENT', `Not a backup id: ${JSON.stringify(id)}.`, { context: { id } })
  }
  return `${instanceFolder(instance)}/${chain}/${backup}`
}

/** A backup's place on a storage, as a key tells it. */
export interface BackupPlace {
  /** The instance's name. */
  readonly instance: string
  /** The id of the full backup that its chain began with. */
  readonly chain: string
  /** The backup's id. */
  readonly backup: string
  /** `<instance>/<chain>/<backup>` */
  readonly folder: string
}

/** The backup in whose folder a key is, or undefined where it is in none. */
export function backupOfKey(key: string): BackupPlace | undefined {
  const [instancePart, chain, backup, ...file] = key.split('/')
  if (instancePart === undefined || chain === undefined || backup === undefined) return undefined
  if (file.length === 0 || !isBackupId(chain) || !isBackupId(backup)) return undefined
  const instance = instanceOfFolder(instancePart)
  if (instance === undefined) return undefined
  return { instance, chain, backup, folder: `${instancePart}/${chain}/${backup}` }
}

/** The backup whose manifest has this key, or undefined for any other key. */
export function parseManifestKey(key: string): BackupPlace | undefined {
  const place = backupOfKey(key)
  return place && key === `${place.folder}/${MANIFEST_FILE}` ? place : undefined
}
