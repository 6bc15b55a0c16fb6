import { randomBytes } from 'node:crypto'
import type { Stats } from 'node:fs'
import { type FileHandle, lstat, open, rename, unlink } from 'node:fs/promises'
import { abortError, TEMPORARY_PREFIX, unlessAborted, VarveError } from '@varve/core'
import { fileCall } from './file-call.ts'
import { type Folder, FolderPath } from './folder.ts'
import { isErrno } from './local-error.ts'

/** How often a folder may vanish between its making and the first file in it, before that is an error. */
const ATTEMPTS = 100

/** A file under a temporary name in its final folder. Its owner publishes it or discards it. */
export class PendingFile {
  readonly file: FileHandle
  readonly #folders: FolderPath
  #name: string

  private constructor(folders: FolderPath, name: string, file: FileHandle) {
    this.#folders = folders
    this.#name = name
    this.file = file
  }

  /** Makes the folders that are missing and the file, empty. */
  static async create(openRoot: () => Promise<Folder>, folderNames: readonly string[]): Promise<PendingFile> {
    for (let attempt = 1; ; attempt++) {
      const root = await openRoot()
      try {
        const folders = await FolderPath.walk(root, folderNames, true)
        return await PendingFile.#createIn(folders)
      } catch (error) {
        // whoever deletes the last object of a folder removes the folder; make it again
        if (!isErrno(error, 'ENOENT') || attempt === ATTEMPTS) throw error
      }
    }
  }

  static async #createIn(folders: FolderPath): Promise<PendingFile> {
    const name = TEMPORARY_PREFIX + randomBytes(8).toString('hex')
    try {
      const file = await folders.last.call(() => open(folders.last.at(name), 'wx', 0o600))
      return new PendingFile(folders, name, file)
    } catch (error) {
      await using _ = folders
      await folders.removeEmpty()
      throw error
    }
  }

  /** Makes the content durable, gives the file its final name and makes that durable. */
  async publish(name: string, size: number, signal?: AbortSignal): Promise<Stats> {
    const { last } = this.#folders
    await unlessAborted(
      last.call(() => this.file.datasync()),
      signal,
    )
    await last.call(() => this.file.close())
    const stats = await last.call(() => lstat(last.at(this.#name)))
    if (stats.size !== size) {
      throw new VarveError(
        'STORAGE_FAILED',
        `${size} bytes were written, but the file has ${stats.size}. Check the disk or the mount.`,
        { context: { size, stored: stats.size } },
      )
    }
    if (signal?.aborted) throw abortError(signal)
    await last.call(() => rename(last.at(this.#name), last.at(name)))
    this.#name = name
    await this.#folders.sync()
    await this.#folders[Symbol.asyncDispose]()
    return stats
  }

  /** Removes the file, published or not, and the folders that are empty without it. */
  async discard(): Promise<void> {
    await using folders = this.#folders
    try {
      await fileCall(() => unlink(folders.last.at(this.#name)))
    } catch (error) {
      if (!isErrno(error, 'ENOENT')) throw error // a publish that failed may have left either name
    } finally {
      await fileCall(() => this.file.close())
    }
    await folders.removeEmpty()
  }
}
