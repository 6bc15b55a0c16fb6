import { constants } from 'node:os'
import { getSystemErrorMap } from 'node:util'
import { errorMessage, isVarveError, VarveError } from '@varve/core'

/** The name of a system error, such as `ENOENT`. */
export type Errno = keyof typeof constants.errno

/** Whether `error` is one of these system errors. Goes by number: Node has no `code` for some, such as `EDQUOT`. */
export function isErrno(error: unknown, ...names: Errno[]): boolean {
  const errno = errnoOf(error)
  return names.some(name => constants.errno[name] === errno)
}

/** Whether `error` says that a plain file, or a folder on the way to it, is not there. */
export function isMissing(error: unknown): boolean {
  // ENOTDIR: a name on the way is a file or a symbolic link, so nothing is behind it; ELOOP: the last name is
  // a symbolic link; ENXIO: it is a socket
  return isErrno(error, 'ENOENT', 'ENOTDIR', 'ELOOP', 'ENXIO')
}

/** What a call gives, or undefined where {@link isMissing} is what it fails with. */
export async function unlessMissing<T>(promise: Promise<T>): Promise<T | undefined> {
  try {
    return await promise
  } catch (error) {
    if (isMissing(error)) return undefined
    throw error
  }
}

/** A file system's error as one that says what was done, to what, and what to do now. */
export function localError(error: unknown, doing: string, path: string): VarveError {
  if (isVarveError(error)) return error
  const options = { context: { path, errno: errnoName(error) }, cause: error }
  const what = `${doing} ${path} failed: ${reason(error)}`
  if (isErrno(error, 'ENOSPC', 'EDQUOT')) {
    const full = isErrno(error, 'EDQUOT') ? 'The quota is used up' : 'The disk is full'
    return new VarveError('STORAGE_FULL', `${full}. ${what}. Delete or prune backups, or add space.`, options)
  }
  if (isErrno(error, 'EACCES', 'EPERM', 'EROFS')) {
    return new VarveError(
      'STORAGE_ACCESS_DENIED',
      `${what}. Check the owner and the permissions of the folder, and that it is not mounted read-only.`,
      options,
    )
  }
  if (isErrno(error, 'ENOTDIR', 'EISDIR', 'ENOTEMPTY', 'EEXIST')) {
    return new VarveError(
      'STORAGE_FAILED',
      `${what}. A folder is where a file should be, or a file or symbolic link where a folder should be.`,
      options,
    )
  }
  if (isErrno(error, 'EFBIG')) {
    return new VarveError(
      'STORAGE_FAILED',
      `${what}. The file system or a limit of the process does not allow a file of this size.`,
      options,
    )
  }
  const retryable = isErrno(error, 'EAGAIN', 'EBUSY', 'EINTR', 'EMFILE', 'ENFILE', 'ESTALE', 'ETIMEDOUT')
  const remedy = errnoOf(error) === undefined ? '' : ' Check the disk or the mount.'
  return new VarveError('STORAGE_FAILED', `${what}.${remedy}`, { ...options, retryable })
}

/** The number of a system error, positive as in `errno(3)`. */
function errnoOf(error: unknown): number | undefined {
  return error instanceof Error && 'errno' in error ? -Number(error.errno) : undefined
}

function errnoName(error: unknown): string | undefined {
  const errno = errnoOf(error)
  return Object.entries(constants.errno).find(([, number]) => number === errno)?.[0]
}

/** Not Node's own message, which would name a path by the number of an open folder. */
function reason(error: unknown): string {
  const name = errnoName(error)
  if (name === undefined) return errorMessage(error)
  const [, text = 'system error'] = getSystemErrorMap().get(-(errnoOf(error) ?? 0)) ?? []
  return `${text} (${name})`
}
