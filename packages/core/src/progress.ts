import { emit, type RunOptions } from './run-options.ts'

const REPORT_EVERY_MS = 250
/** The rate is that of the last few seconds. */
const WINDOW_MS = 5_000

/** Tells of one disk's progress a few times a second. */
export class Progress {
  readonly #run: RunOptions
  readonly #disk: string
  readonly #total: number
  readonly #samples: { at: number; bytes: number }[]
  #reportedAt = 0

  constructor(run: RunOptions, disk: string, bytesTotal: number) {
    this.#run = run
    this.#disk = disk
    this.#total = bytesTotal
    this.#samples = [{ at: performance.now(), bytes: 0 }]
    this.#report(performance.now(), 0)
  }

  /** So many bytes are done; may go back after a retry. */
  update(bytesDone: number): void {
    const now = performance.now()
    if (now - this.#reportedAt >= REPORT_EVERY_MS) this.#report(now, bytesDone)
  }

  /** All is done. */
  finish(): void {
    this.#report(performance.now(), this.#total)
  }

  #report(now: number, bytesDone: number): void {
    this.#reportedAt = now
    this.#samples.push({ at: now, bytes: bytesDone })
    while (this.#samples.length > 2 && (this.#samples[0]?.at ?? now) < now - WINDOW_MS) this.#samples.shift()
    const first = this.#samples[0] ?? { at: now, bytes: bytesDone }
    const seconds = (now - first.at) / 1000
    const bytesPerSecond = seconds > 0 ? Math.max(0, (bytesDone - first.bytes) / seconds) : 0
    emit(this.#run, {
      type: 'progress',
      disk: this.#disk,
      bytesDone,
      bytesTotal: this.#total,
      percent: this.#total === 0 ? 100 : Math.min(100, (bytesDone / this.#total) * 100),
      bytesPerSecond,
      ...(bytesPerSecond > 0 && { secondsLeft: Math.max(0, (this.#total - bytesDone) / bytesPerSecond) }),
    })
  }
}
