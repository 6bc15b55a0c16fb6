import type { VarveEvent } from '@varve/core'
import { eventText } from './event-text.ts'
import { ProgressBars } from './progress-bars.ts'
import type { ProgressDisplay } from './progress-display.ts'
import { ProgressLines } from './progress-lines.ts'
import type { Terminal } from './terminal.ts'

/** Tells a person of a run on standard error: with bars on a terminal, else with a line now and then. */
export class ProgressView {
  readonly #display: ProgressDisplay
  readonly #verbose: boolean

  constructor(stderr: Terminal['stderr'], { verbose }: { verbose: boolean }) {
    this.#display = stderr.isTTY ? new ProgressBars(stderr) : new ProgressLines(stderr)
    this.#verbose = verbose
  }

  /** Shows an event of a run. */
  update(event: VarveEvent): void {
    if (event.type === 'progress') this.#display.progress(event)
    if (event.type === 'stage') this.#display.stage()
    const text = eventText(event, { verbose: this.#verbose })
    if (text !== undefined) this.#display.line(text)
  }

  /** Shows a line. */
  line(text: string): void {
    this.#display.line(text)
  }

  /** Leaves the terminal as it was. */
  close(): void {
    this.#display.close()
  }
}
