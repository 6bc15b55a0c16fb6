import type { Writable } from 'node:stream'
import type { ProgressEvent } from '@varve/core'
import { printable } from './printable.ts'
import type { ProgressDisplay } from './progress-display.ts'
import { formatRate, formatSize } from './size-text.ts'
import { formatClock, formatDuration } from './time-text.ts'

const EVERY_MS = 10_000

/** For logs: lines with the time of day, for each disk one every ten seconds and one at its end. */
export class ProgressLines implements ProgressDisplay {
  readonly #output: Writable
  readonly #now: () => number
  readonly #shown = new Map<string, { at: number; done: boolean }>()

  constructor(output: Writable, now: () => number = Date.now) {
    this.#output = output
    this.#now = now
  }

  line(text: string): void {
    this.#output.write(`${formatClock(new Date(this.#now()))} ${printable(text)}\n`)
  }

  progress(event: ProgressEvent): void {
    const { disk, bytesDone, bytesTotal } = event
    const now = this.#now()
    const done = bytesDone >= bytesTotal
    const shown = this.#shown.get(disk) ?? { at: now, done: false }
    const due = done ? !shown.done : now - shown.at >= EVERY_MS
    this.#shown.set(disk, { at: due ? now : shown.at, done })
    if (due) this.line(progressText(event))
  }

  stage(): void {
    // a line stays as it is
  }

  close(): void {
    // nothing to put right
  }
}

function progressText(event: ProgressEvent): string {
  const { disk, bytesDone, bytesTotal, percent, bytesPerSecond, secondsLeft } = event
  if (bytesDone >= bytesTotal) return `${disk}: 100 % of ${formatSize(bytesTotal)}`
  const left = secondsLeft === undefined ? '' : `, ${formatDuration(secondsLeft)} left`
  return `${disk}: ${Math.floor(percent)} % of ${formatSize(bytesTotal)}, ${formatRate(bytesPerSecond)}${left}`
}
