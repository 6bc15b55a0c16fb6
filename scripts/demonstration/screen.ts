import { styleText } from 'node:util'
import type { VarveEvent } from '@varve/core'
import { ProgressBars } from '../../packages/cli/src/progress-bars.ts'
import type { ProgressDisplay } from '../../packages/cli/src/progress-display.ts'
import { ProgressLines } from '../../packages/cli/src/progress-lines.ts'
import { formatDuration } from '../../packages/cli/src/time-text.ts'

/** What is printed: on a terminal with colours, bars and a line that tells what is waited for. */
export class Screen {
  readonly #output = process.stdout
  readonly #signal: AbortSignal
  #acts = 0

  constructor(signal: AbortSignal) {
    this.#signal = signal
  }

  print(text = ''): void {
    this.#output.write(`${text}\n`)
  }

  bold(text: string): string {
    return styleText('bold', text)
  }

  dim(text: string): string {
    return styleText('dim', text)
  }

  good(text: string): string {
    return styleText('green', text)
  }

  bad(text: string): string {
    return styleText('red', text)
  }

  /** A new act of the story. */
  act(title: string): void {
    this.#acts += 1
    this.print(`\n${styleText('cyan', String(this.#acts).padStart(2))}  ${this.bold(title)}`)
  }

  /** Something worth knowing. */
  note(text: string): void {
    this.print(`      ${this.dim(text)}`)
  }

  /** Something done in the instance or by a tool, with the time that it took. Ends early when the demo is given up. */
  async step<T>(text: string, work: () => Promise<T>): Promise<T> {
    this.#signal.throwIfAborted()
    const startedAt = performance.now()
    if (this.#output.isTTY) this.#output.write(`      ${text} …`)
    try {
      const result = await this.#unlessAborted(work())
      this.#clearLine()
      const seconds = (performance.now() - startedAt) / 1000
      this.print(`      ${text}  ${this.dim(formatDuration(seconds))}`)
      return result
    } catch (error) {
      this.#clearLine()
      throw error
    }
  }

  /** Runs something that tells of its progress, with a bar for each disk. Returns the seconds that it took too. */
  async withBars<T>(
    work: (onEvent: (event: VarveEvent) => void) => Promise<T>,
  ): Promise<{ result: T; seconds: number }> {
    const display = this.#output.isTTY ? new ProgressBars(this.#output) : new ProgressLines(this.#output)
    const startedAt = performance.now()
    try {
      const result = await work(event => show(display, event))
      return { result, seconds: (performance.now() - startedAt) / 1000 }
    } finally {
      display.close()
    }
  }

  #clearLine(): void {
    if (this.#output.isTTY) this.#output.write('\r\x1b[K')
  }

  #unlessAborted<T>(work: Promise<T>): Promise<T> {
    const signal = this.#signal
    return new Promise((resolve, reject) => {
      const onAbort = () => reject(signal.reason)
      signal.addEventListener('abort', onAbort, { once: true })
      work.then(resolve, reject).finally(() => signal.removeEventListener('abort', onAbort))
    })
  }
}

function show(display: ProgressDisplay, event: VarveEvent): void {
  if (event.type === 'progress') display.progress({ ...event, disk: `      ${event.disk}` })
  if (event.type === 'fallback' || event.type === 'warning') display.line(`      ${event.message}`)
}
