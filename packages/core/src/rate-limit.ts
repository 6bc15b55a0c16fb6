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

/** The bounds of what a stream takes at once, in bytes: powers of two. */
const LEAST_PIECE = 16 * 1024
const LARGEST_PIECE = 1024 * 1024
/** How many pieces there are to be in a second. */
const PIECES_PER_SECOND = 16

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

  /**
   * How many bytes a stream takes at once so that none is silent for long while the others have theirs: a server may end
   * an upload of which nothing comes, as S3 does after 20 seconds.
   */
  get piece(): number {
    const wanted = 2 ** Math.floor(Math.log2(this.#bytesPerSecond / PIECES_PER_SECOND))
    return Math.min(LARGEST_PIECE, Math.max(LEAST_PIECE, wanted))
  }

  /** Resolves when `bytes` more may go. */
  async take(bytes: number, signal?: AbortSignal): Promise<void> {
    const now = this.#clock.now()
    const wait = this.#paidUntil - now
    this.#paidUntil = Math.max(now, this.#paidUntil) + (bytes / this.#bytesPerSecond) * 1000
    if (wait > 1) await this.#clock.sleep(wait, signal)
  }
}
