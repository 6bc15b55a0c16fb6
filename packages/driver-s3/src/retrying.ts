import { setTimeout as delay } from 'node:timers/promises'
import { abortError, isVarveError } from '@varve/core'

const FIRST_DELAY_MS = 200
const LONGEST_DELAY_MS = 10_000

/** Options of {@link withRetries}. */
export interface RetryOptions {
  /** How often an attempt is made again. */
  retries: number
  signal?: AbortSignal | undefined
}

/**
 * What `attempt` comes to; one that fails for a moment is made again after a while. Errors are the last
 * attempt's own.
 *
 * @throws ABORTED
 */
export async function withRetries<T>(attempt: () => Promise<T>, options: RetryOptions): Promise<T> {
  const { retries, signal } = options
  for (let failures = 0; ; failures++) {
    if (signal?.aborted) throw abortError(signal)
    try {
      return await attempt()
    } catch (error) {
      if (signal?.aborted) throw abortError(signal)
      if (failures >= retries || !isTransient(error)) throw error
      await backOff(failures, signal)
    }
  }
}

/** Waits before the attempt after so many failures: twice as long each time, less up to a quarter at random. */
export async function backOff(failures: number, signal?: AbortSignal): Promise<void> {
  const longest = Math.min(LONGEST_DELAY_MS, FIRST_DELAY_MS * 2 ** failures)
  try {
    await delay(longest * (1 - Math.random() / 4), undefined, signal ? { signal } : {})
  } catch (error) {
    throw signal?.aborted ? abortError(signal) : error
  }
}

const TRANSIENT_SYSTEM_ERRORS = new Set([
  'ECONNRESET',
  'ECONNREFUSED',
  'ECONNABORTED',
  'EPIPE',
  'ETIMEDOUT',
  'EHOSTUNREACH',
  'ENETUNREACH',
  'EAI_AGAIN',
  'ERR_STREAM_PREMATURE_CLOSE',
])

/** Errors that S3 answers with another status than 5xx, and that pass. */
const TRANSIENT_ANSWERS = new Set([
  'RequestTimeout',
  'RequestTimeTooSkewed', // the SDK has learned the server's clock from the answer
  'IncompleteBody',
  'BadDigest',
  'XAmzContentChecksumMismatch',
  'OperationAborted',
  'ConditionalRequestConflict',
  'Throttling',
  'ThrottlingException',
  'SlowDown',
  'ServiceUnavailable',
  'InternalError',
])

/** Whether the request that this raw error comes from may succeed when it is made again. */
export function isTransient(error: unknown): boolean {
  if (!(error instanceof Error) || isVarveError(error)) return false
  if ('code' in error && typeof error.code === 'string') {
    if (TRANSIENT_SYSTEM_ERRORS.has(error.code) || error.code.startsWith('HPE_')) return true
  }
  if (TRANSIENT_ANSWERS.has(error.name)) return true
  const status = statusOf(error)
  return (
    status === 408 ||
    status === 429 ||
    (status !== undefined && status >= 500 && status !== 501 && status !== 507)
  )
}

/** Whether the storage may have done what the request that this raw error comes from asked for. */
export function mayBeDone(error: unknown): boolean {
  if (isVarveError(error)) return error.code === 'ABORTED'
  const status = statusOf(error)
  if (status !== undefined) return status < 400 || status >= 500
  const neverConnected =
    error instanceof Error &&
    'syscall' in error &&
    (error.syscall === 'connect' || error.syscall === 'getaddrinfo')
  return isTransient(error) && !neverConnected
}

/** The HTTP status of an error of the SDK. */
export function statusOf(error: unknown): number | undefined {
  if (!(error instanceof Error) || !('$metadata' in error)) return undefined
  const metadata = error.$metadata
  if (typeof metadata !== 'object' || metadata === null || !('httpStatusCode' in metadata)) return undefined
  return typeof metadata.httpStatusCode === 'number' ? metadata.httpStatusCode : undefined
}
