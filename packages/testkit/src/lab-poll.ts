import { setTimeout as delay } from 'node:timers/promises'

/**
 * Calls `look` every 50 ms until it gives something else than undefined. For things that send no event.
 * Throws what `timeoutMessage` says when that takes longer than `timeoutMs`.
 */
export async function pollUntil<T>(
  look: () => Promise<T | undefined> | T | undefined,
  timeoutMs: number,
  timeoutMessage: () => string | Promise<string>,
): Promise<T> {
  const deadline = Date.now() + timeoutMs
  for (;;) {
    const seen = await look()
    if (seen !== undefined) return seen
    if (Date.now() >= deadline) throw new Error(await timeoutMessage())
    await delay(50)
  }
}
