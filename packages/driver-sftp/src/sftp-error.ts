import { errorMessage, isVarveError, VarveError } from '@varve/core'

/** Status codes of the SFTP protocol, version 3 (draft-ietf-secsh-filexfer-02, section 7). */
export const STATUS = {
  EOF: 1,
  NO_SUCH_FILE: 2,
  PERMISSION_DENIED: 3,
  FAILURE: 4,
  BAD_MESSAGE: 5,
  OP_UNSUPPORTED: 8,
  // of later versions; some servers send them in version 3 as well
  WRITE_PROTECT: 12,
  NO_SPACE_ON_FILESYSTEM: 14,
  QUOTA_EXCEEDED: 15,
} as const

/** A status code. */
export type Status = (typeof STATUS)[keyof typeof STATUS]

/** The status code of a server's refusal; undefined where it was something else that failed. */
export function statusOf(error: unknown): number | undefined {
  return error instanceof Error && !isVarveError(error) && 'code' in error && typeof error.code === 'number'
    ? error.code
    : undefined
}

/** Whether the server refused with one of these codes. */
export function isStatus(error: unknown, ...codes: Status[]): boolean {
  const status = statusOf(error)
  return codes.some(code => code === status)
}

/** Whether a connection broke, or was not to be had: a new one may do better. */
export function isLost(error: unknown): error is VarveError {
  return isVarveError(error, 'STORAGE_UNREACHABLE') && error.retryable
}

/** A server's refusal as an error that says what was done, to what, and what to do now. */
export function sftpError(error: unknown, doing: string, path: string): VarveError {
  if (isVarveError(error)) return error
  const status = statusOf(error)
  const options = { context: { path, status }, cause: error }
  const what = `${doing} ${path} failed: ${errorMessage(error)}`
  if (isFull(error)) {
    return new VarveError(
      'STORAGE_FULL',
      `The storage is full. ${what}. Delete or prune backups, or add space.`,
      options,
    )
  }
  if (status === STATUS.PERMISSION_DENIED || status === STATUS.WRITE_PROTECT) {
    return new VarveError(
      'STORAGE_ACCESS_DENIED',
      `${what}. Check the owner and the permissions of the folder on the server, and that it may be written to.`,
      options,
    )
  }
  return new VarveError('STORAGE_FAILED', `${what}. ${remedyOf(status)}`, options)
}

function remedyOf(status: number | undefined): string {
  switch (status) {
    case STATUS.FAILURE:
      return 'The server does not say why: look at its log, its disk, and for a file where a folder should be.'
    case STATUS.NO_SUCH_FILE:
      return 'Somebody else has removed or moved it: see who else writes to the folder, and try again.'
    case STATUS.OP_UNSUPPORTED:
      return 'The server does not know this request: use one that has all of SFTP version 3.'
    default:
      return "Look at the server's log."
  }
}

/** Whether a refusal itself says that there is no room. Most servers only say that something failed. */
export function isFull(error: unknown): boolean {
  if (isVarveError(error)) return error.code === 'STORAGE_FULL'
  if (isStatus(error, STATUS.NO_SPACE_ON_FILESYSTEM, STATUS.QUOTA_EXCEEDED)) return true
  return statusOf(error) !== undefined && /no space|disk full|quota/i.test(errorMessage(error))
}
