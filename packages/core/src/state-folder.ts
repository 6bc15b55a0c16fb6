import { readdir, readFile } from 'node:fs/promises'
import { errorMessage, isVarveError, VarveError } from './errors.ts'

const REMEDIES: Readonly<Record<string, string>> = {
  ENOSPC: 'Make room on its file system.',
  EDQUOT: 'Make room: its quota is used up.',
  EROFS: 'Its file system is read-only: mount it for writing, or choose another state folder.',
  EACCES: 'Check the owner and the permissions of the state folder.',
  EPERM: 'Check the owner and the permissions of the state folder.',
  ENOTDIR: 'A file is where a folder should be: choose another state folder.',
}

/** Does something in the state folder; an error of its file system becomes STATE_DIR_FAILED with the path. */
export async function inStateFolder<T>(path: string, work: () => Promise<T>): Promise<T> {
  try {
    return await work()
  } catch (error) {
    if (isVarveError(error)) throw error
    const errno = error instanceof Error && 'code' in error ? String(error.code) : undefined
    const remedy = REMEDIES[errno ?? ''] ?? "Choose a state folder on this machine's own disk."
    throw new VarveError(
      'STATE_DIR_FAILED',
      `The state folder cannot be used, at ${path}: ${errorMessage(error)}. ${remedy}`,
      { context: { path, errno }, cause: error },
    )
  }
}

/** Does something in the folder of temporary files; an error of its file system becomes STATE_DIR_FAILED with the path. */
export async function inTemporaryFolder<T>(path: string, work: () => Promise<T>): Promise<T> {
  try {
    return await work()
  } catch (error) {
    const errno = error instanceof Error && 'code' in error ? String(error.code) : undefined
    throw new VarveError(
      'STATE_DIR_FAILED',
      `The folder of temporary files cannot be used, at ${path}: ${errorMessage(error)}. Make room there and look at its permissions, or set TMPDIR to another folder.`,
      { context: { path, errno }, cause: error },
    )
  }
}

/** The names in a folder of the state folder; none where it is not there. @throws STATE_DIR_FAILED */
export function namesIn(folder: string): Promise<string[]> {
  return inStateFolder(folder, async () => (await unlessMissing(readdir(folder))) ?? [])
}

/** The text of a file in the state folder; undefined where it is not there. @throws STATE_DIR_FAILED */
export function textOf(path: string): Promise<string | undefined> {
  return inStateFolder(path, () => unlessMissing(readFile(path, 'utf8')))
}

async function unlessMissing<T>(found: Promise<T>): Promise<T | undefined> {
  try {
    return await found
  } catch (error) {
    if (error instanceof Error && 'code' in error && error.code === 'ENOENT') return undefined
    throw error
  }
}
