import type { Clock } from '../src/rate-limit.ts'

/** A clock whose time passes only while all that use it wait. */
export class TestClock implements Clock {
  #time = 0
  readonly #waiting: { until: number; resolve: () => void }[] = []

  now(): number {
    return this.#time
  }

  sleep(ms: number): Promise<void> {
    return new Promise(resolve => this.#waiting.push({ until: this.#time + ms, resolve }))
  }

  /** Lets time pass until nobody waits any more. */
  async run(): Promise<void> {
    for (;;) {
      await new Promise(setImmediate)
      const next = this.#waiting.sort((a, b) => a.until - b.until).shift()
      if (!next) return
      this.#time = Math.max(this.#time, next.until)
      next.resolve()
    }
  }
}
