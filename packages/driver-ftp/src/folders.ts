import type { FtpConnection } from './connection.ts'
import { isRefusal } from './ftp-error.ts'

/** Makes the folders of a path that are missing. Says whether it made any: refusals show in what comes next. */
export async function makeFolders(connection: FtpConnection, names: readonly string[]): Promise<boolean> {
  let made = false
  for (let depth = 1; depth <= names.length; depth++) {
    made = (await tried(connection, `MKD ${connection.pathOf(names.slice(0, depth))}`)) || made
  }
  return made
}

/** Whether a folder is there and can be entered. */
export async function isFolder(connection: FtpConnection, names: readonly string[]): Promise<boolean> {
  return tried(connection, `CWD ${connection.pathOf(names) || '/'}`)
}

/** Removes the folders of a path that are empty, from the last one up, as far as `mayRemove` allows. The root stays. */
export async function removeEmptyFolders(
  connection: FtpConnection,
  names: readonly string[],
  mayRemove: (names: readonly string[]) => boolean,
): Promise<void> {
  for (let depth = names.length; depth > 0; depth--) {
    const folder = names.slice(0, depth)
    if (!mayRemove(folder)) return
    // refused: it is not empty, or is gone already; then the one above it is looked at by who removed it
    if (!(await tried(connection, `RMD ${connection.pathOf(folder)}`))) return
  }
}

/**
 * The folders that uploads of this driver are about to write in. Between the making of a folder and the first file
 * in it, a delete would find it empty.
 */
export class FoldersInUse {
  readonly #uses = new Map<string, number>()

  /** Keeps a folder, and those above it, until the returned function is called. */
  keep(names: readonly string[]): () => void {
    const paths = names.map((_, depth) => names.slice(0, depth + 1).join('/'))
    for (const path of paths) this.#uses.set(path, (this.#uses.get(path) ?? 0) + 1)
    return () => {
      for (const path of paths) {
        const left = (this.#uses.get(path) ?? 0) - 1
        if (left > 0) this.#uses.set(path, left)
        else this.#uses.delete(path)
      }
    }
  }

  /** Whether nobody keeps a folder. */
  isFree(names: readonly string[]): boolean {
    return !this.#uses.has(names.join('/'))
  }
}

async function tried(connection: FtpConnection, command: string): Promise<boolean> {
  try {
    await connection.command(command)
    return true
  } catch (error) {
    if (isRefusal(error)) return false
    throw error
  }
}
