import { formatRate, formatSize } from '../../packages/cli/src/size-text.ts'
import { renderTable } from '../../packages/cli/src/table.ts'
import type { Screen } from './screen.ts'

/** One line of the closing table. */
export interface Row {
  readonly what: string
  readonly kind: string
  /** Size of the guest's disks in bytes. */
  readonly disks: number
  /** Bytes stored, read or written. */
  readonly bytes: number
  readonly seconds: number
}

/** Prints what was done and what was proved. */
export function printSummary(screen: Screen, rows: readonly Row[], proofs: readonly string[]): void {
  const lines = renderTable(
    [
      { title: 'What' },
      { title: 'Kind' },
      { title: 'Disks', align: 'right' },
      { title: 'Moved', align: 'right' },
      { title: 'Seconds', align: 'right' },
      { title: 'Rate', align: 'right' },
    ],
    rows.map(({ what, kind, disks, bytes, seconds }) => [
      what,
      kind,
      formatSize(disks),
      formatSize(bytes),
      seconds.toFixed(1),
      formatRate(bytes / seconds),
    ]),
  ).split('\n')
  const width = Math.max(...lines.map(line => line.length))
  const [titles = '', ...cells] = lines
  screen.print(`\n    ${screen.bold(titles)}\n    ${'─'.repeat(width)}`)
  for (const line of cells) screen.print(`    ${line}`)
  screen.note(
    '  Seconds are those of the whole run: snapshot, transfer, digests, publication, block-commit.\n',
  )
  for (const proof of proofs) screen.print(`    ${screen.good('PROVED')}  ${proof}`)
}
