/** The clock is looked at this often while a timeout lasts, so that a timeout may last an eighth longer. */
const TICKS_PER_TIMEOUT = 8

/**
 * Tells when something has made no progress for too long. Progress is one assignment, since it comes with every
 * few kilobytes; and time in which the whole process stood still does not count.
 */
export class StallTimer {
  readonly #tickMs: number
  #most = TICKS_PER_TIMEOUT
  readonly #onStall: () => void
  #timer: NodeJS.Timeout | undefined
  #ticks = 0
  #isWaiting = false

  /** Calls `onStall` when there was no progress for too long while it was waited for; `timeoutMs` is the shortest limit. */
  constructor(timeoutMs: number, onStall: () => void) {
    this.#tickMs = timeoutMs / TICKS_PER_TIMEOUT
    this.#onStall = onStall
  }

  /** Progress is waited for from now on, for `limitMs` at most. */
  wait(limitMs: number): void {
    this.#isWaiting = true
    this.#ticks = 0
    this.#most = limitMs / this.#tickMs
    this.#timer ??= setInterval(() => this.#tick(), this.#tickMs)
  }

  /** There was progress, and more is waited for. */
  progress(): void {
    this.#ticks = 0
  }

  /** Nothing is waited for. The clock stops at its next tick: often something is waited for again before that. */
  rest(): void {
    this.#isWaiting = false
  }

  /** Ends the clock. */
  stop(): void {
    clearInterval(this.#timer)
    this.#timer = undefined
  }

  #tick(): void {
    if (!this.#isWaiting) this.stop()
    else if (++this.#ticks > this.#most) this.#onStall()
  }
}
