import { setTimeout as sleep } from 'node:timers/promises'

/** Keeps streams that share it together under a number of bytes a second. */
export class RateLimit {
  readonly #bytesPerSecond: number
  /** When all the bytes let through so far have been paid for, in milliseconds. */
  #paidUntil = 0

  constructor(bytesPerSecond: number) {
    this.#bytesPerSecond = bytesPerSecond
  }

  /** Resolves when `bytes` more may go. */
  async take(bytes: number, signal?: AbortSignal): Promise<void> {
    const now = performance.now()
    const wait = this.#paidUntil - now
    this.#paidUntil = Math.max(now, this.#paidUntil) + (bytes / this.#bytesPerSecond) * 1000
    if (wait > 1) await sleep(wait, undefined, signal && { signal })
  }
}
