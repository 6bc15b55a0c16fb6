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

type TableName = 'Refcount table' | 'L1' | 'L2'

/** The L2 tables that an L1 table points at: in one piece, in the order of their entries. */
interface TableList {
  count: number
  /** Index in the L1 table, ascending. */
  l1Index: Uint32Array
  /** File offset of the first one. */
  readonly start: number
  /** The first byte after the L1 table and all L2 tables. */
  end: number
}

/** How to read tables. */
export interface ReadTablesOptions {
  /** The most runs that the image may have. */
  readonly maxRuns: number
  readonly signal: AbortSignal | undefined
}

/**
 * Reads the tables of an image. From the refcount table on one thing follows another without a gap: refcount blocks,
 * L1 table, L2 tables, data clusters, up to the end of the file. So every offset is known before it is read, no two
 * overlap, and nothing is in the file that no table tells of. What is in the refcount blocks matters to writers only.
 */
export async function readTables(
  file: ImageFile,
  header: ParsedHeader,
  options: ReadTablesOptions,
): Promise<ImageExtents> {
  await checkRefcountTable(file, header, options.signal)
  const tables = await readL1(file, header, options.signal)
  return readL2(file, header, tables, options)
}

async function checkRefcountTable(
  file: ImageFile,
  header: ParsedHeader,
  signal: AbortSignal | undefined,
): Promise<void> {
  const { clusterSize, refcountTableOffset, refcountTableClusters, l1Offset } = header
  const length = refcountTableClusters * clusterSize
  const blocks = refcountTableOffset + length
  let free = blocks
  let index = 0
  await readWindows(file, split(refcountTableOffset, length), signal, view => {
    for (let at = 0; at < view.byteLength; at += ENTRY_BYTES, index++) {
      const high = view.getUint32(at)
      const low = view.getUint32(at + 4)
      if (high === 0 && low === 0) continue
      if (low & ~OFFSET_LOW) throw invalid('Refcount table', index, 'has reserved bits set')
      const offset = high * SIZE_OF_HIGH + low
      checkPlace('Refcount table', index, offset, free, header, file)
      if (offset >= l1Offset)
        throw invalid('Refcount table', index, `points at ${offset}, after the L1 table begins`)
      free = offset + clusterSize
      if (free !== blocks + (index + 1) * clusterSize)
        throw unsupported('Refcount table', index, 'comes after an empty one')
    }
  })
  if (free !== l1Offset)
    throw new Qcow2Error(
      'QCOW2_UNSUPPORTED',
      `Its refcount blocks end at ${free} and the L1 table begins at ${l1Offset}; Varve leaves no gaps.`,
    )
}

async function readL1(
  file: ImageFile,
  header: ParsedHeader,
  signal: AbortSignal | undefined,
): Promise<TableList> {
  const { clusterSize, l1Offset, l1Entries } = header
  const start = l1Offset + Math.ceil((l1Entries * ENTRY_BYTES) / clusterSize) * clusterSize
  const tables: TableList = { count: 0, l1Index: new Uint32Array(16), start, end: start }
  let index = 0
  await readWindows(file, split(l1Offset, l1Entries * ENTRY_BYTES), signal, view => {
    for (let at = 0; at < view.byteLength; at += ENTRY_BYTES, index++) {
      const high = view.getUint32(at)
      const low = view.getUint32(at + 4)
      if (high === 0 && low === 0) continue
      const offset = entryOffset('L1', index, high, low)
      checkPlace('L1', index, offset, tables.end, header, file)
      if (tables.count === tables.l1Index.length) tables.l1Index = grown(tables.l1Index)
      tables.l1Index[tables.count++] = index
      tables.end = offset + clusterSize
    }
  })
  return tables
}

async function readL2(
  file: ImageFile,
  header: ParsedHeader,
  tables: TableList,
  { maxRuns, signal }: ReadTablesOptions,
): Promise<ImageExtents> {
  const { clusterSize, virtualSize } = header
  const perTable = clusterSize / ENTRY_BYTES
  const clusters = Math.ceil(virtualSize / clusterSize)
  const extents = new ImageExtents(maxRuns)
  let covered = 0 // guest clusters in `extents`
  let free = tables.end // the first byte that may be of a data cluster
  let table = 0
  let index = 0
  const add = (until: number, kind: ExtentKind, offset: number): void => {
    const end = Math.min(until * clusterSize, virtualSize)
    extents.append(end - covered * clusterSize, kind, offset)
    covered = until
  }
  await readWindows(file, split(tables.start, tables.end - tables.start), signal, view => {
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
  if (free < file.size)
    throw new Qcow2Error(
      'QCOW2_UNSUPPORTED',
      `The file of ${file.size} bytes goes on after the last cluster, which ends at ${free}.`,
    )
  return extents
}

/** The offset in an entry that is not empty; no flag but COPIED, which says that nothing else uses the cluster. */
function entryOffset(table: TableName, index: number, high: number, low: number): number {
  if (table === 'L2' && high & COMPRESSED_HIGH) throw unsupported(table, index, 'is a compressed cluster')
  if (high & ~(COPIED_HIGH | OFFSET_HIGH) || low & ~OFFSET_LOW)
    throw invalid(table, index, 'has reserved bits set')
  if (!(high & COPIED_HIGH)) throw unsupported(table, index, 'points at a cluster that is shared')
  return (high & OFFSET_HIGH) * SIZE_OF_HIGH + ((low & OFFSET_LOW) >>> 0)
}

/** A cluster is aligned, in the file, and right after all that comes before it in Varve's order. */
function checkPlace(
  table: TableName,
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
  if (offset > free) throw unsupported(table, index, `points at ${offset}; Varve leaves no gap after ${free}`)
}

/** Pieces of a table that is in one piece. */
function* split(offset: number, length: number): Generator<Window> {
  for (let at = 0; at < length; at += WINDOW_BYTES)
    yield { offset: offset + at, length: Math.min(WINDOW_BYTES, length - at) }
}

function invalid(table: TableName, index: number, what: string): Qcow2Error {
  return new Qcow2Error('QCOW2_INVALID', `${table} entry ${index} ${what}.`, { table, index })
}

function unsupported(table: TableName, index: number, what: string): Qcow2Error {
  return new Qcow2Error('QCOW2_UNSUPPORTED', `${table} entry ${index} ${what}.`, { table, index })
}
