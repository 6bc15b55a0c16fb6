import { lstat, stat, statfs } from 'node:fs/promises'
import { dirname, isAbsolute, normalize } from 'node:path'
import { isKey, makeFolders, VarveError } from '@varve/core'
import { fileCall } from './file-call.ts'
import { Folder } from './folder.ts'
import { isMissing, localError } from './local-error.ts'

/** Options of {@link LocalDriver}. */
export interface LocalDriverOptions {
  /** The folder that holds the backups; absolute. Symbolic links in this path are followed. */
  path: string
  /** Makes the folder where it is missing. Default: false, since a missing folder is mostly a missing mount. */
  create?: boolean
  /**
   * Refuses to work unless the folder is a mount point: a share that is not mounted is an empty folder on the
   * machine's own disk. A folder below a mount point does not count, nor does a bind mount from the same file
   * system; use `marker` for them. Default: false.
   */
  requireMountPoint?: boolean
  /**
   * The name of a file that must be in the folder, or nothing is done there. Make it once, while the share is
   * mounted: `touch /mnt/backup/.varve-storage`. It is no object: no method shows or changes it.
   * Default: none needed.
   */
  marker?: string
}

/** The folder of the configuration, and what must be true of it each time that it is used. */
export class StorageRoot {
  readonly path: string
  readonly marker: string | undefined
  readonly #create: boolean
  readonly #requireMountPoint: boolean

  constructor({ path, create = false, requireMountPoint = false, marker }: LocalDriverOptions) {
    if (!isAbsolute(path) || path.includes('\0')) {
      throw invalid('path', path, 'It must be an absolute path, such as /mnt/backup')
    }
    if (marker !== undefined && (!isKey(marker) || marker.includes('/'))) {
      throw invalid('marker', marker, 'It must be the name of a file in the folder, such as .varve-storage')
    }
    if (create && (requireMountPoint || marker !== undefined)) {
      throw invalid('create', 'true', 'A folder that is newly made is no mount point and holds no marker')
    }
    this.path = normalize(path)
    this.marker = marker
    this.#create = create
    this.#requireMountPoint = requireMountPoint
  }

  /**
   * Opens the folder, once it is what it should be.
   *
   * @param signal see {@link Folder.open}
   * @throws STORAGE_NOT_FOUND, STORAGE_NOT_MOUNTED
   */
  async open(signal?: AbortSignal): Promise<Folder> {
    let root: Folder
    try {
      if (this.#create) await makeDurably(this.path, signal)
      root = await Folder.open(this.path, signal)
    } catch (error) {
      if (!isMissing(error)) throw localError(error, 'Opening', this.path)
      throw new VarveError(
        'STORAGE_NOT_FOUND',
        `The storage folder ${this.path} is not there, or is no folder. Make it, or mount what belongs there.`,
        { context: { path: this.path }, cause: error },
      )
    }
    try {
      await this.#assertMounted(root)
      return root
    } catch (error) {
      await using _ = root
      throw localError(error, 'Looking up', this.path)
    }
  }

  /** Bytes that can still be written by who runs this. */
  async freeBytes(signal?: AbortSignal): Promise<number> {
    await using root = await this.open(signal)
    const { bavail, bsize } = await root.call(() => statfs(root.path))
    return bavail * bsize
  }

  async #assertMounted(root: Folder): Promise<void> {
    if (this.#requireMountPoint) {
      const own = await root.call(() => root.handle.stat())
      const parent = await root.call(() => stat(root.at('..')))
      // the same device as its parent: no mount point; the same folder as its parent: the root of everything
      if (own.dev === parent.dev && own.ino !== parent.ino) {
        throw notMounted(this.path, 'it is no mount point')
      }
    }
    if (this.marker !== undefined) {
      const path = root.at(this.marker)
      try {
        await root.call(() => lstat(path))
      } catch (error) {
        if (!isMissing(error)) throw error
        throw notMounted(this.path, `the file ${this.marker} is not in it`)
      }
    }
  }
}

/** Makes a folder and its parents where they are missing, durably. */
async function makeDurably(path: string, signal: AbortSignal | undefined): Promise<void> {
  for (const folder of await fileCall(() => makeFolders(path), signal)) await syncFolder(dirname(folder))
}

async function syncFolder(path: string): Promise<void> {
  await using folder = await Folder.open(path)
  await folder.sync()
}

function invalid(field: string, value: string, rule: string): VarveError {
  return new VarveError(
    'INVALID_CONFIG',
    `${field} of a local storage cannot be ${JSON.stringify(value)}. ${rule}.`,
    {
      context: { field, value },
    },
  )
}

function notMounted(path: string, why: string): VarveError {
  return new VarveError(
    'STORAGE_NOT_MOUNTED',
    `The storage folder ${path} does not hold the storage: ${why}. Mount what belongs there and try again.`,
    { context: { path }, retryable: true },
  )
}
