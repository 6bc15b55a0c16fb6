import type { VarveEvent } from '@varve/core'
import { MultiBar, Presets, type SingleBar } from 'cli-progress'

const MiB = 1024 * 1024

/** A line of the closing table. */
interface Row {
  readonly what: string
  readonly virtual: number
  readonly stored: number
  readonly seconds: number
}

/** What the demo shows: steps, live progress bars (lines without a terminal), proofs and a closing table. */
export class DemoView {
  readonly #terminal = process.stdout.isTTY === true
  readonly #rows: Row[] = []
  readonly #bars = new Map<string, SingleBar>()
  #multi: MultiBar | undefined
  #proofs = 0

  step(text: string): void {
    this.#clear()
    console.log(`\n==> ${text}`)
  }

  say(text: string): void {
    this.#clear()
    console.log(`    ${text}`)
  }

  /** Says what was proved, or ends the demo. */
  prove(text: string, holds: boolean): void {
    this.#clear()
    if (!holds) throw new Error(`Not so: ${text}`)
    this.#proofs += 1
    console.log(`    PROVED  ${text}`)
  }

  fail(error: unknown): void {
    this.#clear()
    console.error(`\nThe demo failed: ${error instanceof Error ? error.message : String(error)}`)
    if (error instanceof Error && error.name !== 'VarveError') console.error(error.stack)
  }

  row(what: string, disks: readonly { virtualSize: number; storedSize: number }[], seconds: number): void {
    const sum = (sizes: number[]) => sizes.reduce((total, size) => total + size, 0)
    const [virtual, stored] = [
      sum(disks.map(disk => disk.virtualSize)),
      sum(disks.map(disk => disk.storedSize)),
    ]
    this.#rows.push({ what, virtual, stored, seconds })
  }

  /** Receives the events of pipelines. */
  readonly onEvent = (event: VarveEvent): void => {
    if (event.type === 'fallback' || event.type === 'warning') this.say(event.message)
    if (event.type !== 'progress') return
    const { disk, percent, bytesPerSecond, secondsLeft, bytesDone, bytesTotal } = event
    const payload = {
      disk: disk.padEnd(6),
      size: `${(bytesTotal / MiB).toFixed(1)} MiB`,
      rate: `${(bytesPerSecond / MiB).toFixed(0)} MiB/s`,
      left: secondsLeft === undefined ? '' : `${Math.ceil(secondsLeft)} s left`,
    }
    if (!this.#terminal) {
      if (bytesDone === bytesTotal)
        console.log(`    ${payload.disk} 100 % of ${payload.size}, ${payload.rate}`)
      return
    }
    this.#multi ??= new MultiBar(
      {
        format: '    {disk} {bar} {percentage} %  {size}  {rate}  {left}',
        clearOnComplete: false,
        hideCursor: true,
      },
      Presets.shades_classic,
    )
    const bar = this.#bars.get(disk) ?? this.#multi.create(100, 0, payload)
    this.#bars.set(disk, bar)
    bar.update(Math.round(percent), payload)
  }

  /** The closing table. */
  close(): void {
    this.#clear()
    const head = ['what', 'disks', 'moved', 'seconds', 'rate']
    const lines = this.#rows.map(({ what, virtual, stored, seconds }) => [
      what,
      `${(virtual / MiB).toFixed(0)} MiB`,
      `${(stored / MiB).toFixed(1)} MiB`,
      seconds.toFixed(2),
      `${(stored / MiB / seconds).toFixed(0)} MiB/s`,
    ])
    const widths = head.map((title, column) =>
      Math.max(title.length, ...lines.map(line => line[column]?.length ?? 0)),
    )
    const print = (cells: string[]) =>
      console.log(
        `    ${cells.map((cell, i) => (i === 0 ? cell.padEnd(widths[i] ?? 0) : cell.padStart(widths[i] ?? 0))).join('   ')}`,
      )
    console.log('')
    print(head)
    print(widths.map(width => '-'.repeat(width)))
    for (const line of lines) print(line)
    console.log(`\n    ${this.#proofs} proofs, all hold.`)
  }

  #clear(): void {
    this.#multi?.stop()
    this.#multi = undefined
    this.#bars.clear()
  }
}
