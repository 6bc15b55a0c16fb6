/**
 * The stable codes of {@link VarveError}. Every code has a section of the same name in
 * docs/troubleshooting.md.
 */
export type ErrorCode =
  // what was asked for
  | 'INVALID_ARGUMENT'
  | 'INVALID_CONFIG'
  | 'INVALID_KEY'
  | 'INSTANCE_NOT_FOUND'
  | 'DISK_NOT_FOUND'
  | 'DISK_UNSUPPORTED'
  | 'DISK_TOO_FRAGMENTED'
  | 'BACKUP_NOT_ENABLED'
  // state of a host
  | 'STATE_DIR_FAILED'
  | 'DISK_BUSY'
  | 'MEMORY_SAVED'
  | 'INSTANCE_TRANSIENT'
  | 'RUN_UNRESOLVED'
  | 'DISK_INCOMPLETE'
  | 'OVERLAY_LEFT_OVER'
  | 'OVERLAY_SPACE_LOW'
  | 'COMMAND_FAILED'
  | 'COMMAND_TIMEOUT'
  | 'COMMAND_MISSING'
  | 'NBD_SOCKET_MISSING'
  | 'NBD_FAILED'
  | 'SNAPSHOT_FAILED'
  | 'BLOCK_COMMIT_FAILED'
  | 'FREEZE_FAILED'
  | 'RESUME_FAILED'
  | 'POWER_OFF_FAILED'
  // Ceph
  | 'CEPH_UNREACHABLE'
  | 'CEPH_ACCESS_DENIED'
  | 'CEPH_POOL_NOT_FOUND'
  | 'RBD_SNAPSHOT_NOT_FOUND'
  | 'RBD_SNAPSHOT_PROTECTED'
  | 'RBD_STREAM_INVALID'
  | 'RBD_FAILED'
  // chains
  | 'PARENT_MISSING'
  | 'BACKUP_NOT_FOUND'
  | 'CHAIN_BROKEN'
  | 'CHAIN_DEPENDENCY'
  | 'MANIFEST_INVALID'
  | 'MANIFEST_VERSION'
  | 'IMAGE_INVALID'
  | 'SIZE_MISMATCH'
  | 'DIGEST_MISMATCH'
  // restore
  | 'TARGET_EXISTS'
  | 'TARGET_TOO_SMALL'
  | 'TARGET_FULL'
  | 'TARGET_FAILED'
  // storage
  | 'STORAGE_UNREACHABLE'
  | 'STORAGE_ACCESS_DENIED'
  | 'STORAGE_NOT_FOUND'
  | 'STORAGE_FULL'
  | 'STORAGE_NOT_MOUNTED'
  | 'STORAGE_FAILED'
  | 'OBJECT_NOT_FOUND'
  | 'UPLOAD_FAILED'
  // life of a run
  | 'ABORTED'
  | 'TIMEOUT'
  | 'UNEXPECTED'
  // the command line
  | 'OUTPUT_FAILED'

/** Details of an error: names, paths, sizes, exit codes. Never a secret. */
export type ErrorContext = Readonly<Record<string, string | number | boolean | readonly string[] | undefined>>

/** How to make a {@link VarveError}. */
export interface VarveErrorOptions {
  /** Details for logs and for a panel. Never a secret. */
  context?: ErrorContext
  /** The error that led to this one. */
  cause?: unknown
  /** Whether the same call may succeed when it is simply made again. Default: false. */
  retryable?: boolean
}

/**
 * The one error class. Tell errors apart by {@link VarveError.code}, never by message or
 * `instanceof`: two copies of this package may be loaded side by side.
 *
 * A message says what happened and, after it, what to do.
 */
export class VarveError extends Error {
  /** What went wrong, as a stable word. */
  readonly code: ErrorCode
  /** Details: names, paths, sizes, exit codes. Never a secret. */
  readonly context: ErrorContext
  /** Whether the same call may succeed when it is simply made again. */
  readonly retryable: boolean

  constructor(code: ErrorCode, message: string, options: VarveErrorOptions = {}) {
    super(message, options.cause === undefined ? undefined : { cause: options.cause })
    this.name = 'VarveError'
    this.code = code
    this.context = options.context ?? {}
    this.retryable = options.retryable ?? false
  }
}

/** Whether `error` is a {@link VarveError}, also one of another copy of this package; with `code`, of that code. */
export function isVarveError(error: unknown, code?: ErrorCode): error is VarveError {
  return (
    error instanceof Error &&
    error.name === 'VarveError' &&
    'code' in error &&
    (code === undefined || error.code === code)
  )
}

/** The text of anything thrown. */
export function errorMessage(error: unknown): string {
  return error instanceof Error ? error.message : String(error)
}

/** What a run rejects with, whatever was thrown in it: an error that nobody has foreseen has the code `UNEXPECTED`. */
export function runError(error: unknown, signal?: AbortSignal): VarveError {
  if (signal?.aborted && (error === signal.reason || !isVarveError(error))) return abortError(signal)
  if (isVarveError(error)) return error
  return new VarveError(
    'UNEXPECTED',
    `Something that Varve does not expect: ${errorMessage(error)}. Look at what that names; if nothing is wrong with it, this is an error of Varve's: report it with the error that is its cause.`,
    { cause: error },
  )
}

/**
 * The error of a run that its caller gave up: `ABORTED`, with the signal's reason as its cause. The reason may be the error of
 * another run, whose code and context tell nothing of this one.
 */
export function abortError(signal: AbortSignal): VarveError {
  const { reason } = signal
  const message = errorMessage(reason)
  if (!isVarveError(reason, 'ABORTED'))
    return new VarveError('ABORTED', `Given up: ${message}`, { cause: reason })
  if (Object.keys(reason.context).length === 0) return reason
  return new VarveError('ABORTED', message, { cause: reason })
}
