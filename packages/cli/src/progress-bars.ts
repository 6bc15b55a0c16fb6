import type { ProgressEvent } from '@varve/core'
import { MultiBar, type Options, type Params, type SingleBar } from 'cli-progress'
import { printable } from './printable.ts'
import type { ProgressDisplay } from './progress-display.ts'
import { formatRate, formatSize } from './size-text.ts'
import type { Terminal } from './terminal.ts'
import { formatDuration } from './time-text.ts'

/** What a bar shows beside itself. */
interface Payload {
  readonly event: ProgressEvent
  /** Since the first event of the disk. */
  readonly seconds: number
}

/** A bar for each disk, with the lines of the run above them. */
export class ProgressBars implements ProgressDisplay {
  readonly #output: Terminal['stderr']
  #bars: { readonly multi: MultiBar; readonly byDisk: Map<string, Bar> } | undefined

  constructor(output: Terminal['stderr']) {
    this.#output = output
  }

  line(text: string): void {
    const safe = `${printable(text)}\n`
    if (this.#bars) this.#bars.multi.log(safe)
    else this.#output.write(safe)
  }

  progress(event: ProgressEvent): void {
    this.#bars ??= { multi: this.#createMultiBar(), byDisk: new Map() }
    const { multi, byDisk } = this.#bars
    const { disk, bytesDone, bytesTotal } = event
    let bar = byDisk.get(disk)
    if (!bar) {
      bar = {
        single: multi.create(bytesTotal, 0, { event, seconds: 0 } satisfies Payload),
        startedAt: performance.now(),
        done: false,
      }
      byDisk.set(disk, bar)
    }
    const seconds = (performance.now() - bar.startedAt) / 1000
    bar.single.update(bytesDone, { event, seconds } satisfies Payload)
    bar.done = bytesDone >= bytesTotal
  }

  stage(): void {
    // Bars that are full stay where they are, and what comes next is written below them.
    if (this.#bars && [...this.#bars.byDisk.values()].every(({ done }) => done)) this.close()
  }

  close(): void {
    if (!this.#bars) return
    const { multi } = this.#bars
    multi.update() // the lines that were not written yet
    multi.stop()
    this.#bars = undefined
  }

  #createMultiBar(): MultiBar {
    return new MultiBar({
      stream: this.#output,
      format: formatBar,
      hideCursor: true,
      // the terminal may wrap the lines above the bars; the bars themselves are cut to its width
      linewrap: true,
      fps: 8,
      // a line above the bars overwrites one of them, so all are drawn again
      forceRedraw: true,
      gracefulExit: false,
    })
  }
}

interface Bar {
  readonly single: SingleBar
  readonly startedAt: number
  done: boolean
}

/** One bar as text that fits the terminal's width. */
export function formatBar(
  _options: Options,
  { progress, maxWidth }: Pick<Params, 'progress' | 'maxWidth'>,
  { event, seconds }: Payload,
): string {
  const { disk, bytesDone, bytesTotal, bytesPerSecond, secondsLeft } = event
  const width = Math.min(40, Math.max(8, maxWidth - 60))
  const filled = Math.floor(progress * width)
  const bar = '█'.repeat(filled) + '░'.repeat(width - filled)
  const begin = `${disk}  ${bar} ${String(Math.floor(progress * 100)).padStart(3)} %`
  if (bytesDone >= bytesTotal) {
    const rate = seconds >= 1 ? `, ${formatRate(bytesTotal / seconds)}` : ''
    return `${begin}  ${formatSize(bytesTotal)} in ${formatDuration(seconds)}${rate}`
  }
  const amount = `${formatSize(bytesDone)} of ${formatSize(bytesTotal)}`
  const rate = bytesPerSecond > 0 ? formatRate(bytesPerSecond) : ''
  const left = secondsLeft === undefined ? '' : `${formatDuration(secondsLeft)} left`
  return [begin, amount, rate, left].filter(part => part !== '').join('  ')
}
