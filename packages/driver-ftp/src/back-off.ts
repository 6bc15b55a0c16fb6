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
