/** A column of {@link renderTable}. */
export interface Column {
  readonly title: string
  /** Default: `left`. */
  readonly align?: 'left' | 'right'
}

/** Lines of text with aligned columns, the titles first. */
export function renderTable(columns: readonly Column[], rows: readonly (readonly string[])[]): string {
  const lines = [columns.map(({ title }) => title), ...rows]
  const widths = columns.map((_, index) => Math.max(...lines.map(line => line[index]?.length ?? 0)))
  return lines
    .map(line =>
      columns
        .map(({ align }, index) => {
          const cell = line[index] ?? ''
          const width = widths[index] ?? 0
          return align === 'right' ? cell.padStart(width) : cell.padEnd(width)
        })
        .join('  ')
        .trimEnd(),
    )
    .join('\n')
}
