import { setTimeout as sleep } from 'node:timers/promises'
import { abortError } from '@varve/core'

const FIRST_BACKOFF_MS = 100
/** How much longer each further wait is, up to the longest. */
const BACKOFF_FACTOR = 3
const LONGEST_BACKOFF_MS = 10_000

/** How long to wait after so many failures, in milliseconds. */
export function backOffMs(failures: number): number {
  return Math.min(FIRST_BACKOFF_MS * BACKOFF_FACTOR ** (failures - 1), LONGEST_BACKOFF_MS)
}

/** Waits before the next try: longer after each failure, and not on after an abort. */
export async function backOff(failures: number, signal: AbortSignal | undefined): Promise<void> {
  try {
    await sleep(backOffMs(failures), undefined, signal ? { signal } : {})
  } catch (error) {
    throw signal ? abortError(signal) : error
  }
}
