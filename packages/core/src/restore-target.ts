import { errorMessage, isVarveError, VarveError } from './errors.ts'

/** Options of the calls to a {@link RestoreTarget}. */
export interface TargetOptions {
  /** Gives the call up. */
  readonly signal?: AbortSignal
}

/**
 * What a disk is restored to. Writes come in any order, many at once, and never twice for the same byte; what
 * is neither written nor zeroed does not occur. After all of them one of `finish` and `abort` is called, once.
 */
export interface RestoreTarget {
  /** Writes bytes of the guest's disk. `data` belongs to the target until the promise settles. */
  write(guestOffset: number, data: Uint8Array, options?: TargetOptions): Promise<void>
  /** Makes bytes of the guest's disk read as zeros. */
  zero(guestOffset: number, length: number, options?: TargetOptions): Promise<void>
  /** Makes everything durable. Only then the target is the disk. */
  finish(options?: TargetOptions): Promise<void>
  /** Gives the target up: what it created is removed. Called when nothing is in flight any more. */
  abort(): Promise<void>
}

/** What a failure of a target is called. `path` names the target. */
export function targetError(error: unknown, path: string): VarveError {
  if (isVarveError(error)) return error
  const errno = errnoOf(error)
  const options = { context: { path, errno }, cause: error }
  if (errno === 'ENOSPC' || errno === 'EDQUOT') {
    return new VarveError(
      'TARGET_FULL',
      `There is no space left to write ${path}. Free some and restore again.`,
      options,
    )
  }
  if (errno === 'EEXIST') {
    return new VarveError(
      'TARGET_EXISTS',
      `${path} is there already. Choose another path, or ask for it to be overwritten (overwrite, --overwrite).`,
      options,
    )
  }
  return new VarveError(
    'TARGET_FAILED',
    `${path} could not be written: ${errorMessage(error)}. Check the path and the device below it.`,
    options,
  )
}

/** `ENOSPC` and the like: the `code` of Node's errors, the `errno` of an NBD server's. */
function errnoOf(error: unknown): string | undefined {
  if (!(error instanceof Error)) return undefined
  if ('errno' in error && typeof error.errno === 'string') return error.errno
  return 'code' in error && typeof error.code === 'string' ? error.code : undefined
}
