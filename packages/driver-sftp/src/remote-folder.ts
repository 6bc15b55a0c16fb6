import { VarveError } from '@varve/core'
import type { Stats } from 'ssh2'
import type { RequestOptions, SftpConnection } from './connection.ts'
import type { StorageRoot } from './session.ts'
import { isStatus, STATUS } from './sftp-error.ts'

const FOLDER_MODE = 0o700
/** How often a folder is made that others may remove meanwhile. */
const ATTEMPTS = 3

/** The path of a key, or of a folder of keys, on the server. */
export function pathIn(root: StorageRoot, ...names: string[]): string {
  return [root.path === '/' ? '' : root.path, ...names].join('/')
}

/** What there is at a path; undefined where nothing is. Symbolic links are not followed. */
export async function look(
  connection: SftpConnection,
  path: string,
  options?: RequestOptions,
): Promise<Stats | undefined> {
  try {
    return await connection.call<Stats>((sftp, done) => sftp.lstat(path, done), options)
  } catch (error) {
    if (isStatus(error, STATUS.NO_SUCH_FILE)) return undefined
    throw error
  }
}

/** Whether a path leads to a folder; a symbolic link to one counts. */
export async function isFolder(
  connection: SftpConnection,
  path: string,
  options?: RequestOptions,
): Promise<boolean> {
  const stats = await connection.call<Stats>((sftp, done) => sftp.stat(path, done), options)
  return stats.isDirectory()
}

/**
 * Whether a path is still itself when the server has resolved every symbolic link in it: SFTP has no way to open
 * something without following those that somebody else may have put there.
 */
export async function isPlain(
  connection: SftpConnection,
  path: string,
  options?: RequestOptions,
): Promise<boolean> {
  try {
    const real = await connection.call<string>((sftp, done) => sftp.realpath(path, done), options)
    return real.normalize() === path.normalize() // some file systems spell accents in their own way
  } catch (error) {
    if (isStatus(error, STATUS.NO_SUCH_FILE)) return false
    throw error
  }
}

/**
 * Tells a storage without an object from a storage that is not there any more.
 *
 * @throws STORAGE_NOT_FOUND
 */
export async function assertRoot({ connection, path }: StorageRoot, options?: RequestOptions): Promise<void> {
  try {
    if (await isFolder(connection, path, options)) return
  } catch (error) {
    if (!isStatus(error, STATUS.NO_SUCH_FILE)) throw error
  }
  throw new VarveError(
    'STORAGE_NOT_FOUND',
    `The storage folder ${path} is not there any more on the server. Mount what belongs there, or make it again.`,
    { context: { path } },
  )
}

/** Makes a folder unless it is there. A missing parent is `NO_SUCH_FILE`. */
export async function makeFolder(
  connection: SftpConnection,
  path: string,
  options?: RequestOptions,
): Promise<void> {
  for (let attempt = 1; ; attempt++) {
    try {
      await connection.call((sftp, done) => sftp.mkdir(path, { mode: FOLDER_MODE }, done), options)
      return
    } catch (error) {
      // version 3 of the protocol has no code for what is there already, and the parent may not be writable
      if (!isStatus(error, STATUS.FAILURE, STATUS.PERMISSION_DENIED)) throw error
      const stats = await look(connection, path, options)
      if (stats?.isDirectory() || (stats && (await isFolder(connection, path)))) return
      if (stats || attempt === ATTEMPTS) throw error // else it was there, and whoever emptied it removed it
    }
  }
}

/** Makes the folders of a key that are missing, from the root of the storage down. */
export async function makeKeyFolders(
  root: StorageRoot,
  names: readonly string[],
  options?: RequestOptions,
): Promise<void> {
  for (let depth = 1; depth <= names.length; depth++) {
    const path = pathIn(root, ...names.slice(0, depth))
    const stats = await look(root.connection, path, options)
    if (stats?.isDirectory()) continue
    if (stats) {
      throw new VarveError(
        'STORAGE_FAILED',
        `${path} is no folder, but objects have to be in it. Move it away.`,
        {
          context: { path },
        },
      )
    }
    await makeFolder(root.connection, path, options)
  }
}

/**
 * Removes the folders of a key that are empty, from the last one up. The root of the storage stays. An upload that
 * loses its folder so makes it again.
 */
export async function removeEmptyFolders(
  root: StorageRoot,
  names: readonly string[],
  options?: RequestOptions,
): Promise<void> {
  for (let depth = names.length; depth > 0; depth--) {
    const path = pathIn(root, ...names.slice(0, depth))
    try {
      await root.connection.call((sftp, done) => sftp.rmdir(path, done), options)
    } catch (error) {
      if (isStatus(error, STATUS.NO_SUCH_FILE)) continue
      // one that is not empty, is needed by somebody, or belongs to somebody else
      if (isStatus(error, STATUS.FAILURE, STATUS.PERMISSION_DENIED)) return
      throw error
    }
  }
}
