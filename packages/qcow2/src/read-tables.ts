import { Qcow2Error } from './errors.ts'
import { ExtentKind } from './extent-list.ts'
import { COMPRESSED_HIGH, COPIED_HIGH, ENTRY_BYTES, ZERO_LOW } from './format.ts'
import { grown } from './grown.ts'
import { ImageExtents } from './image-extents.ts'
import type { ImageFile } from './image-file.ts'
import type { ParsedHeader } from './parse-header.ts'
import { readWindows, WINDOW_BYTES, type Window } from './read-windows.ts'

const OFFSET_HIGH = 0x00ffffff // bits 32 to 55 of an offset
const OFFSET_LOW = 0xfffffe00 // bits 9 to 31
const SIZE_OF_HIGH = 0x1_0000_0000

/** The L2 tables that an L1 table points at. */
interface TableList {
  count: number
  /** Index in the L1 table, ascending. */
  l1Index: Uint32Array
  /** File offset, ascending. */
  offset: Float64Array
  /** The first byte after the L1 table and all L2 tables. */
  end: number
}

/**
 * Reads the L1 and L2 tables of an image. All L2 tables follow the L1 table, and all data clusters follow the
 * L2 tables, both in ascending order: that no two overlap needs no more than a comparison with the last one.
 */
export async function readTables(
  file: ImageFile,
  header: ParsedHeader,
  signal: AbortSignal | undefined,
): Promise<ImageExtents> {
  const tables = await readL1(file, header, signal)
  return readL2(file, header, tables, signal)
}

async function readL1(
  file: ImageFile,
  header: ParsedHeader,
  signal: AbortSignal | undefined,
): Promise<TableList> {
  const { clusterSize, l1Offset, l1Entries } = header
  const tables: TableList = {
    count: 0,
    l1Index: new Uint32Array(16),
    offset: new Float64Array(16),
    end: l1Offset + Math.ceil((l1Entries * ENTRY_BYTES) / clusterSize) * clusterSize,
  }
  let index = 0
  await readWindows(file, split(l1Offset, l1Entries * ENTRY_BYTES), signal, view => {
    for (let at = 0; at < view.byteLength; at += ENTRY_BYTES, index++) {
      const high = view.getUint32(at)
      const low = view.getUint32(at + 4)
      if (high === 0 && low === 0) continue
      const offset = entryOffset('L1', index, high, low)
      checkPlace('L1', index, offset, tables.end, header, file)
      if (tables.count === tables.offset.length) {
        tables.l1Index = grown(tables.l1Index)
        tables.offset = grown(tables.offset)
      }
      tables.l1Index[tables.count] = index
      tables.offset[tables.count] = offset
      tables.count++
      tables.end = offset + clusterSize
    }
  })
  return tables
}

async function readL2(
  file: ImageFile,
  header: ParsedHeader,
  tables: TableList,
  signal: AbortSignal | undefined,
): Promise<ImageExtents> {
  const { clusterSize, virtualSize } = header
  const perTable = clusterSize / ENTRY_BYTES
  const clusters = Math.ceil(virtualSize / clusterSize)
  const extents = new ImageExtents()
  let covered = 0 // guest clusters in `extents`
  let free = tables.end // the first byte that may be of a data cluster
  let table = 0
  let index = 0
  const add = (until: number, kind: ExtentKind, offset: number): void => {
    const end = Math.min(until * clusterSize, virtualSize)
    extents.append(end - covered * clusterSize, kind, offset)
    covered = until
  }
  await readWindows(file, tableWindows(tables, clusterSize), signal, view => {
    for (let at = 0; at < view.byteLength; at += ENTRY_BYTES) {
      const high = view.getUint32(at)
      const low = view.getUint32(at + 4)
      const cluster = (tables.l1Index[table] ?? 0) * perTable + index
      if (++index === perTable) {
        index = 0
        table++
      }
      if (high === 0 && low === 0) continue
      if (cluster >= clusters) throw invalid('L2', cluster, 'is for a cluster after the end of the disk')
      if (covered < cluster) add(cluster, ExtentKind.unallocated, 0)
      if (high === 0 && low === ZERO_LOW) {
        add(cluster + 1, ExtentKind.zero, 0)
        continue
      }
      if (low & ZERO_LOW) throw unsupported('L2', cluster, 'is a zero cluster with space in the file')
      const offset = entryOffset('L2', cluster, high, low)
      checkPlace('L2', cluster, offset, free, header, file)
      free = offset + clusterSize
      add(cluster + 1, ExtentKind.data, offset)
    }
  })
  if (covered < clusters) add(clusters, ExtentKind.unallocated, 0)
  return extents
}

/** The offset in an entry that is not empty; no flag but COPIED, which says that nothing else uses the cluster. */
function entryOffset(table: 'L1' | 'L2', index: number, high: number, low: number): number {
  if (table === 'L2' && high & COMPRESSED_HIGH) throw unsupported(table, index, 'is a compressed cluster')
  if (high & ~(COPIED_HIGH | OFFSET_HIGH) || low & ~OFFSET_LOW)
    throw invalid(table, index, 'has reserved bits set')
  if (!(high & COPIED_HIGH)) throw unsupported(table, index, 'points at a cluster that is shared')
  return (high & OFFSET_HIGH) * SIZE_OF_HIGH + ((low & OFFSET_LOW) >>> 0)
}

/** A cluster is aligned, in the file, and after all that comes before it in Varve's order. */
function checkPlace(
  table: 'L1' | 'L2',
  index: number,
  offset: number,
  free: number,
  { clusterSize }: ParsedHeader,
  { size }: ImageFile,
): void {
  if (offset % clusterSize !== 0) throw invalid(table, index, `points at ${offset}, inside a cluster`)
  if (offset + clusterSize > size)
    throw invalid(
      table,
      index,
      `points at ${offset}, and the file of ${size} bytes ends before its cluster does`,
    )
  if (offset === 0 || offset === free - clusterSize)
    throw invalid(table, index, `points at ${offset}, which is in use`)
  if (offset < free)
    throw unsupported(table, index, `points at ${offset}; Varve writes tables and data in ascending order`)
}

/** Pieces of a table that is in one piece. */
function* split(offset: number, length: number): Generator<Window> {
  for (let at = 0; at < length; at += WINDOW_BYTES)
    yield { offset: offset + at, length: Math.min(WINDOW_BYTES, length - at) }
}

/** Neighbouring L2 tables in one window, as many as fit. */
function* tableWindows(tables: TableList, clusterSize: number): Generator<Window> {
  let offset = 0
  let length = 0
  for (let table = 0; table < tables.count; table++) {
    const next = tables.offset[table] ?? 0
    if (length > 0 && (next !== offset + length || length + clusterSize > WINDOW_BYTES)) {
      yield { offset, length }
      length = 0
    }
    if (length === 0) offset = next
    length += clusterSize
  }
  if (length > 0) yield { offset, length }
}

function invalid(table: string, index: number, what: string): Qcow2Error {
  return new Qcow2Error('QCOW2_INVALID', `${table} entry ${index} ${what}.`, { table, index })
}

function unsupported(table: string, index: number, what: string): Qcow2Error {
  return new Qcow2Error('QCOW2_UNSUPPORTED', `${table} entry ${index} ${what}.`, { table, index })
}
