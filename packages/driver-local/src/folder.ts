import { constants } from 'node:fs'
import { type FileHandle, mkdir, open, rmdir } from 'node:fs/promises'
import { fileCall } from './file-call.ts'
import { isErrno } from './local-error.ts'

const FOLDER = constants.O_RDONLY | constants.O_DIRECTORY

/**
 * An open folder, as the place that names inside it are resolved from. `/proc/self/fd/<n>/<name>` is Linux's
 * way to `openat(2)` and its relatives from a runtime that lacks them: whoever else can write to the storage
 * cannot lead a call out of it by putting a symbolic link in place of a folder, not even between two calls.
 */
export class Folder implements AsyncDisposable {
  readonly handle: FileHandle
  readonly #signal: AbortSignal | undefined

  private constructor(handle: FileHandle, signal: AbortSignal | undefined) {
    this.handle = handle
    this.#signal = signal
  }

  /**
   * Opens the folder at a path of the configuration; symbolic links in it are followed.
   *
   * @param signal gives up what waits to be done in it and in the folders that are entered from it
   */
  static async open(path: string, signal?: AbortSignal): Promise<Folder> {
    return new Folder(await fileCall(() => open(path, FOLDER), signal), signal)
  }

  /** Makes one call to the file system, unless it is given up before. */
  call<T>(call: () => Promise<T>): Promise<T> {
    return fileCall(call, this.#signal)
  }

  /** The path of the folder itself while it is open. */
  get path(): string {
    return `/proc/self/fd/${this.handle.fd}`
  }

  /** The path of a name inside the folder. */
  at(name: string): string {
    return `${this.path}/${name}`
  }

  /** Opens a folder inside this one. A symbolic link is `ENOTDIR`. */
  async enter(name: string): Promise<Folder> {
    const handle = await this.call(() => open(this.at(name), FOLDER | constants.O_NOFOLLOW))
    return new Folder(handle, this.#signal)
  }

  /** Makes the entries of the folder durable. Like all that comes after a change, it is not given up. */
  async sync(): Promise<void> {
    try {
      await fileCall(() => this.handle.sync())
    } catch (error) {
      // some network file systems have no such call for folders, and no delayed entries either
      if (!isErrno(error, 'EINVAL', 'ENOSYS', 'ENOTSUP', 'EOPNOTSUPP')) throw error
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await fileCall(() => this.handle.close())
  }
}

/** The folders from a root down to one below it, all open. */
export class FolderPath implements AsyncDisposable {
  readonly #folders: Folder[]
  readonly #names: readonly string[]

  private constructor(root: Folder, names: readonly string[]) {
    this.#folders = [root]
    this.#names = names
  }

  /**
   * Goes down from `root`, which then belongs to the path. With `create`, folders that are missing are made.
   * Fails with the file system's own error: `ENOENT` when a folder is missing, also when another process
   * removes it meanwhile; `ENOTDIR` when a name is no folder.
   */
  static async walk(root: Folder, names: readonly string[], create = false): Promise<FolderPath> {
    const path = new FolderPath(root, names)
    try {
      for (const name of names) {
        if (create) await makeFolder(path.last, name)
        path.#folders.push(await path.last.enter(name))
      }
      return path
    } catch (error) {
      await using _ = path
      if (create) await path.removeEmpty()
      throw error
    }
  }

  /** The folder that the path leads to. */
  get last(): Folder {
    return this.#folders.at(-1) as Folder
  }

  /** Makes every folder of the path durable: one of them may have been made a moment ago, also by others. */
  async sync(): Promise<void> {
    for (const folder of this.#folders.toReversed()) await folder.sync()
  }

  /** Removes the folders of the path that are empty, from the last one up. The root stays. Not given up: it cleans up. */
  async removeEmpty(): Promise<void> {
    for (const [depth, name] of [...this.#names.entries()].reverse()) {
      try {
        const parent = this.#folders[depth]
        if (parent) await fileCall(() => rmdir(parent.at(name)))
      } catch (error) {
        if (isErrno(error, 'ENOENT')) continue
        if (isErrno(error, 'ENOTEMPTY', 'EEXIST', 'ENOTDIR', 'EBUSY')) return
        throw error
      }
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const folder of this.#folders) await folder[Symbol.asyncDispose]()
  }
}

async function makeFolder(parent: Folder, name: string): Promise<void> {
  try {
    await parent.call(() => mkdir(parent.at(name), 0o700))
  } catch (error) {
    if (!isErrno(error, 'EEXIST')) throw error
  }
}
