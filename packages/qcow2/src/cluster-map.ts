import { Qcow2Error } from './errors.ts'
import { ExtentKind, type ExtentList } from './extent-list.ts'
import { lastAtMost } from './search.ts'

/**
 * The runs of guest clusters that have L2 entries, data and explicit zeros, in ascending order, and how many
 * data clusters come before each: data clusters lie in the file in that order. 25 bytes a run.
 */
export class ClusterMap {
  /** The number of runs. */
  readonly count: number
  /** Data clusters in all runs. */
  readonly dataClusters: number
  readonly #first: Float64Array
  readonly #end: Float64Array
  readonly #dataBefore: Float64Array
  readonly #isData: Uint8Array

  constructor(extents: ExtentList, clusterSize: number, keepZeros: boolean) {
    let count = 0
    for (let i = 0; i < extents.count; i++) if (isKept(extents.kind(i), keepZeros)) count++
    this.count = count
    this.#first = new Float64Array(count)
    this.#end = new Float64Array(count)
    this.#dataBefore = new Float64Array(count)
    this.#isData = new Uint8Array(count)

    let dataClusters = 0
    for (let i = 0, run = 0; i < extents.count; i++) {
      const start = extents.start(i)
      if (start % clusterSize !== 0) {
        throw new Qcow2Error(
          'QCOW2_ARGUMENT',
          `Extent ${i} begins at ${start}, inside a cluster of ${clusterSize} bytes.`,
          { start, clusterSize },
        )
      }
      if (!isKept(extents.kind(i), keepZeros)) continue
      const first = start / clusterSize
      const end = Math.ceil((start + extents.length(i)) / clusterSize)
      this.#first[run] = first
      this.#end[run] = end
      this.#dataBefore[run] = dataClusters
      if (extents.kind(i) === ExtentKind.data) {
        this.#isData[run] = 1
        dataClusters += end - first
      }
      run++
    }
    this.dataClusters = dataClusters
  }

  /** The first cluster of a run. */
  first(run: number): number {
    return this.#first[run] ?? 0
  }

  /** The first cluster after a run. */
  end(run: number): number {
    return this.#end[run] ?? 0
  }

  /** The data clusters in all runs before this one. */
  dataBefore(run: number): number {
    return this.#dataBefore[run] ?? 0
  }

  /** Whether a run is data; otherwise it is explicit zeros. */
  isData(run: number): boolean {
    return this.#isData[run] === 1
  }

  /** The first run that ends after a guest cluster: the one it is in, or the next one. May be `count`. */
  runFrom(cluster: number): number {
    const run = lastAtMost(this.#first, this.count, cluster)
    return run >= 0 && cluster < this.end(run) ? run : run + 1
  }

  /** The run that holds the data cluster `index`, counted in the order of the file. */
  runOfData(index: number): number {
    // A run of zeros has as many data clusters before it as the data run after it: the last one is meant.
    return lastAtMost(this.#dataBefore, this.count, index)
  }
}

function isKept(kind: ExtentKind, keepZeros: boolean): boolean {
  return kind === ExtentKind.data || (keepZeros && kind === ExtentKind.zero)
}
