import type { ClusterMap } from './cluster-map.ts'
import { grown } from './grown.ts'
import { lastAtMost } from './search.ts'

/** Which L2 tables an image needs, as runs of indices into the L1 table; at most one run for each of the map's. */
export class TableRuns {
  /** L2 tables in all. */
  readonly tables: number
  readonly #count: number
  readonly #first: Float64Array
  readonly #tablesBefore: Float64Array

  constructor(map: ClusterMap, clustersPerTable: number) {
    let count = 0
    let tables = 0
    let next = 0 // the first L1 index that is in no run yet
    let first = new Float64Array(16)
    let tablesBefore = new Float64Array(16)
    for (let run = 0; run < map.count; run++) {
      const from = Math.floor(map.first(run) / clustersPerTable)
      const end = Math.ceil(map.end(run) / clustersPerTable)
      if (end <= next) continue
      if (count === 0 || from > next) {
        if (count === first.length) {
          first = grown(first)
          tablesBefore = grown(tablesBefore)
        }
        first[count] = from
        tablesBefore[count] = tables
        count++
        next = from
      }
      tables += end - next
      next = end
    }
    this.tables = tables
    this.#count = count
    this.#first = first
    this.#tablesBefore = tablesBefore
  }

  /** The L1 index of the L2 table `table`, counted in the order of the file. */
  l1Index(table: number): number {
    const run = lastAtMost(this.#tablesBefore, this.#count, table)
    return (this.#first[run] ?? 0) + table - (this.#tablesBefore[run] ?? 0)
  }

  /** The first table whose L1 index is at least `l1Index`. May be `tables`. */
  tableFrom(l1Index: number): number {
    const run = lastAtMost(this.#first, this.#count, l1Index)
    if (run < 0) return 0
    const end = run + 1 < this.#count ? (this.#tablesBefore[run + 1] ?? 0) : this.tables
    return Math.min((this.#tablesBefore[run] ?? 0) + l1Index - (this.#first[run] ?? 0), end)
  }
}
