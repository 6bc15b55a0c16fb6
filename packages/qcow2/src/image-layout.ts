import type { ClusterMap } from './cluster-map.ts'
import { Qcow2Error } from './errors.ts'
import { COPIED_HIGH, ENTRY_BYTES, REFCOUNT_BYTES, ZERO_LOW } from './format.ts'
import { writeEntry, writeTable } from './table-entries.ts'
import type { TableRuns } from './table-runs.ts'

/** Where the parts of an image begin in its file, in the order of the file. */
interface Sections {
  readonly refcountTable: number
  readonly refcountBlocks: number
  readonly l1: number
  readonly l2: number
  readonly data: number
}

/** All that an {@link ImageLayout} is made of. */
export interface LayoutParts {
  readonly clusterSize: number
  readonly virtualSize: number
  readonly extentsSize: number
  readonly header: Uint8Array
  readonly sections: Sections
  readonly refcountBlocks: number
  readonly map: ClusterMap
  readonly tables: TableRuns
}

/**
 * Where everything is in a qcow2 image that is not written yet: header, refcount table, refcount blocks, L1
 * table, L2 tables, then data clusters in ascending guest order, with nothing between. No table is held in
 * memory: its bytes are computed when they are asked for. Made by {@link planImage}.
 */
export class ImageLayout {
  /** The size of the disk in the image, in bytes: that of the extents, rounded up to a multiple of 512. */
  readonly virtualSize: number
  /** In bytes. */
  readonly clusterSize: number
  /** The exact size of the image's file, in bytes. */
  readonly fileSize: number
  /** File offset of the first data cluster: everything before it is metadata. */
  readonly dataStart: number
  /** The bytes of all data clusters: `fileSize - dataStart`. */
  readonly dataLength: number
  /**
   * The bytes of the guest that the extents cover; what is left of the last cluster is zeros.
   * @internal
   */
  readonly extentsSize: number
  /** @internal */
  readonly map: ClusterMap
  readonly #parts: LayoutParts

  /** @internal */
  constructor(parts: LayoutParts) {
    this.#parts = parts
    this.map = parts.map
    this.extentsSize = parts.extentsSize
    this.virtualSize = parts.virtualSize
    this.clusterSize = parts.clusterSize
    this.dataStart = parts.sections.data
    this.dataLength = parts.map.dataClusters * parts.clusterSize
    this.fileSize = this.dataStart + this.dataLength
  }

  /** Where a byte of the guest is in the file, or undefined where it is not data. */
  fileOffset(guestOffset: number): number | undefined {
    if (!(guestOffset >= 0 && guestOffset < this.virtualSize)) return undefined
    const { map, clusterSize } = this
    const cluster = Math.floor(guestOffset / clusterSize)
    const run = map.runFrom(cluster)
    if (run === map.count || cluster < map.first(run) || !map.isData(run)) return undefined
    const first = map.first(run) - map.dataBefore(run) // the guest cluster of data cluster 0, were all one run
    return this.dataStart + guestOffset - first * clusterSize
  }

  /**
   * Fills `into` with the bytes of the file from `start` on; all of them lie before {@link ImageLayout.dataStart}.
   * Throws `QCOW2_ARGUMENT` where they do not.
   */
  readMetadata(start: number, into: Uint8Array): void {
    const { sections } = this.#parts
    const end = start + into.length
    if (!Number.isSafeInteger(start) || start < 0 || end > sections.data) {
      throw new Qcow2Error(
        'QCOW2_ARGUMENT',
        `Bytes ${start} to ${end} are not within the ${sections.data} bytes of metadata.`,
        { start, end },
      )
    }
    into.fill(0)
    const part = (from: number, to: number, write: (position: number, bytes: Uint8Array) => void): void => {
      const first = Math.max(start, from)
      const last = Math.min(end, to)
      if (first < last) write(first - from, into.subarray(first - start, last - start))
    }
    part(0, sections.refcountTable, (position, bytes) => this.#writeHeader(position, bytes))
    part(sections.refcountTable, sections.refcountBlocks, (position, bytes) =>
      writeTable(position, bytes, this.#writeRefcountTable),
    )
    part(sections.refcountBlocks, sections.l1, (position, bytes) => this.#writeRefcounts(position, bytes))
    part(sections.l1, sections.l2, (position, bytes) => writeTable(position, bytes, this.#writeL1))
    part(sections.l2, sections.data, (position, bytes) => writeTable(position, bytes, this.#writeL2))
  }

  #writeHeader(position: number, into: Uint8Array): void {
    into.set(this.#parts.header.subarray(position, position + into.length))
  }

  readonly #writeRefcountTable = (view: DataView, first: number, count: number): void => {
    const end = Math.min(first + count, this.#parts.refcountBlocks)
    for (let block = first; block < end; block++) {
      const offset = this.#parts.sections.refcountBlocks + block * this.clusterSize
      writeEntry(view, (block - first) * ENTRY_BYTES, offset, 0)
    }
  }

  /** Every cluster of the file is used once: 00 01 for each, zeros after the last. */
  #writeRefcounts(position: number, into: Uint8Array): void {
    const used = (this.fileSize / this.clusterSize) * REFCOUNT_BYTES
    const end = Math.min(into.length, used - position)
    for (let i = (position + 1) % REFCOUNT_BYTES; i < end; i += REFCOUNT_BYTES) into[i] = 1
  }

  readonly #writeL1 = (view: DataView, first: number, count: number): void => {
    const { tables, sections } = this.#parts
    const end = tables.tableFrom(first + count)
    for (let table = tables.tableFrom(first); table < end; table++) {
      const offset = sections.l2 + table * this.clusterSize
      writeEntry(view, (tables.l1Index(table) - first) * ENTRY_BYTES, offset, COPIED_HIGH)
    }
  }

  readonly #writeL2 = (view: DataView, first: number, count: number): void => {
    const perTable = this.clusterSize / ENTRY_BYTES
    for (let done = 0; done < count; ) {
      const table = Math.floor((first + done) / perTable)
      const index = first + done - table * perTable
      const length = Math.min(count - done, perTable - index)
      this.#writeClusters(view, done, this.#parts.tables.l1Index(table) * perTable + index, length)
      done += length
    }
  }

  /** The L2 entries of `count` guest clusters from `cluster` on, at entry `at` of `view`. */
  #writeClusters(view: DataView, at: number, cluster: number, count: number): void {
    const { map, clusterSize } = this
    const stop = cluster + count
    for (let run = map.runFrom(cluster); run < map.count && map.first(run) < stop; run++) {
      const from = Math.max(map.first(run), cluster)
      const to = Math.min(map.end(run), stop)
      let entry = (at + from - cluster) * ENTRY_BYTES
      let offset = this.dataStart + (map.dataBefore(run) + from - map.first(run)) * clusterSize
      if (map.isData(run)) {
        for (let i = from; i < to; i++, entry += ENTRY_BYTES, offset += clusterSize)
          writeEntry(view, entry, offset, COPIED_HIGH)
      } else {
        for (let i = from; i < to; i++, entry += ENTRY_BYTES) view.setUint32(entry + 4, ZERO_LOW)
      }
    }
  }
}
