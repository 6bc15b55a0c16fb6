import { setTimeout as sleep } from 'node:timers/promises'

/** What a {@link RateLimit} tells the time by and waits with, in milliseconds. */
export interface Clock {
  now(): number
  sleep(ms: number, signal: AbortSignal | undefined): Promise<void>
}

const SYSTEM_CLOCK: Clock = {
  now: () => performance.now(),
  sleep: (ms, signal) => sleep(ms, undefined, signal && { signal }),
}

/** Keeps streams that share it together under a number of bytes a second. */
export class RateLimit {
  readonly #bytesPerSecond: number
  readonly #clock: Clock
  /** When all the bytes let through so far have been paid for, in milliseconds. */
  #paidUntil = 0

  constructor(bytesPerSecond: number, clock: Clock = SYSTEM_CLOCK) {
    this.#bytesPerSecond = bytesPerSecond
    this.#clock = clock
  }

  /** Resolves when `bytes` more may go. */
  async take(bytes: number, signal?: AbortSignal): Promise<void> {
    const now = this.#clock.now()
    const wait = this.#paidUntil - now
    this.#paidUntil = Math.max(now, this.#paidUntil) + (bytes / this.#bytesPerSecond) * 1000
    if (wait > 1) await this.#clock.sleep(wait, signal)
  }
}
