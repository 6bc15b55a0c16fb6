import { setTimeout as sleep } from 'node:timers/promises'
import { abortError } from '@varve/core'

const FIRST_BACKOFF_MS = 100
/** How much longer each further wait is. */
const BACKOFF_FACTOR = 3

/** Waits before the next try: longer after each failure, and not on after an abort. */
export async function backOff(failures: number, signal: AbortSignal | undefined): Promise<void> {
  try {
    await sleep(FIRST_BACKOFF_MS * BACKOFF_FACTOR ** (failures - 1), undefined, signal ? { signal } : {})
  } catch (error) {
    throw signal ? abortError(signal) : error
  }
}

/** What `work` comes to, or `ABORTED` as soon as the signal says so; `work` itself goes on. */
export async function unlessAborted<T>(work: Promise<T>, signal: AbortSignal | undefined): Promise<T> {
  if (!signal) return work
  const { promise: aborted, reject } = Promise.withResolvers<never>()
  const onAbort = () => reject(abortError(signal))
  signal.addEventListener('abort', onAbort, { once: true })
  if (signal.aborted) onAbort()
  try {
    return await Promise.race([work, aborted])
  } finally {
    signal.removeEventListener('abort', onAbort)
  }
}
