/**
 * The stable codes of {@link NbdError}:
 *
 * - `NBD_CONNECT`: the server cannot be reached, does not have the export, or has another one than before.
 * - `NBD_PROTOCOL`: the server sent what the protocol does not allow. The client is not usable any more.
 * - `NBD_FRAGMENTED`: the export has more extents than a map holds, or than are listened to; nothing is wrong with it.
 * - `NBD_SERVER`: the server answered a request with an error; see {@link NbdError.errno}.
 * - `NBD_TIMEOUT`: the server made no progress for the client's `timeoutMs`, or with a flush for its `flushTimeoutMs`.
 * - `NBD_DISCONNECTED`: the connection was lost and could not be opened again, or was closed, or was lost with a
 *   write on it.
 * - `NBD_ABORTED`: the caller's signal was aborted; its reason is the cause.
 * - `NBD_ARGUMENT`: the call itself is wrong: out of range, unaligned, or a write to a read-only export.
 */
export type NbdErrorCode =
  | 'NBD_CONNECT'
  | 'NBD_PROTOCOL'
  | 'NBD_FRAGMENTED'
  | 'NBD_SERVER'
  | 'NBD_TIMEOUT'
  | 'NBD_DISCONNECTED'
  | 'NBD_ABORTED'
  | 'NBD_ARGUMENT'

/** Details of an {@link NbdError}: the address, the command, offsets and lengths in bytes. */
export type NbdErrorContext = Readonly<Record<string, string | number | boolean | undefined>>

/** How to make an {@link NbdError}. */
export interface NbdErrorOptions {
  /** Details for logs. */
  context?: NbdErrorContext
  /** The error that led to this one. */
  cause?: unknown
  /** The error of an `NBD_SERVER`, such as `EIO`. */
  errno?: string
}

/** Every error of this package. Tell them apart by {@link NbdError.code}. */
export class NbdError extends Error {
  /** What went wrong, as a stable word. */
  readonly code: NbdErrorCode
  /** Details: the address, the command, offsets and lengths in bytes. */
  readonly context: NbdErrorContext
  /** Of `NBD_SERVER`: the error that the server gave, such as `EIO` or `ENOSPC`. */
  readonly errno?: string

  constructor(code: NbdErrorCode, message: string, options: NbdErrorOptions = {}) {
    super(message, options.cause === undefined ? undefined : { cause: options.cause })
    this.name = 'NbdError'
    this.code = code
    this.context = options.context ?? {}
    if (options.errno !== undefined) this.errno = options.errno
  }
}

/** The error of a server that does what the protocol does not allow. */
export function protocolError(what: string, context?: NbdErrorContext): NbdError {
  return new NbdError(
    'NBD_PROTOCOL',
    `The NBD server broke the protocol: ${what}.`,
    context ? { context } : {},
  )
}

/** The error of a call whose signal was aborted. */
export function abortedError(signal: AbortSignal): NbdError {
  const { reason } = signal
  const why = reason instanceof Error ? reason.message : String(reason)
  return new NbdError('NBD_ABORTED', `The NBD request was given up: ${why}`, { cause: reason })
}

/** Anything thrown as an {@link NbdError}: itself, or the cause of one with `code`. */
export function toNbdError(error: unknown, code: NbdErrorCode, message: string): NbdError {
  if (error instanceof NbdError) return error
  const why = error instanceof Error ? error.message : String(error)
  return new NbdError(code, `${message}: ${why}`, { cause: error })
}

/** A text of a server, made fit for a message: printable, on one line, at most 200 characters. */
export function serverText(bytes: Uint8Array): string {
  const text = new TextDecoder().decode(bytes.subarray(0, 800))
  return text
    .replace(/[\p{C}\p{Zl}\p{Zp}]+/gu, ' ')
    .trim()
    .slice(0, 200)
}
