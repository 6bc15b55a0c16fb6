import { getSystemErrorMap } from 'node:util'
import { errorMessage, isVarveError, VarveError } from '@varve/core'

/** Whether `error` is a file system's error of one of these names, such as `ENOENT`. */
export function isErrno(error: unknown, ...codes: string[]): boolean {
  return error instanceof Error && 'code' in error && codes.includes(String(error.code))
}

/** Whether `error` says that a plain file, or a folder on the way to it, is not there. */
export function isMissing(error: unknown): boolean {
  // ENOTDIR: a name on the way is a file or a symbolic link, so nothing is behind it; ELOOP: the last name is
  // a symbolic link; ENXIO: it is a socket
  return isErrno(error, 'ENOENT', 'ENOTDIR', 'ELOOP', 'ENXIO')
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
  return new VarveError('STORAGE_FAILED', `${what}. Check the disk or the mount.`, { ...options, retryable })
}

/** `ENOSPC` and the like. */
function errnoName(error: unknown): string | undefined {
  return error instanceof Error && 'errno' in error && 'code' in error ? String(error.code) : undefined
}

/** Node's own message would name a path by the number of an open folder. */
function reason(error: unknown): string {
  const errno = error instanceof Error && 'errno' in error ? Number(error.errno) : Number.NaN
  const [name, text] = getSystemErrorMap().get(errno) ?? []
  return name ? `${text} (${name})` : errorMessage(error)
}
