import { Qcow2Error } from './errors.ts'
import {
  ENTRY_BYTES,
  Field,
  HeaderExtension,
  MAGIC,
  MAX_BACKING_NAME_BYTES,
  MAX_CLUSTER_SIZE,
  MAX_L1_BYTES,
  MAX_REFCOUNT_TABLE_BYTES,
  MIN_CLUSTER_SIZE,
  MIN_HEADER_LENGTH,
  REFCOUNT_ORDER,
  SECTOR_SIZE,
  VERSION,
} from './format.ts'
import { type HeaderFields, headerBytes } from './header-bytes.ts'
import type { BackingFile } from './plan-image.ts'

/** What is read of a file to find its header in: every cluster is at least as large. */
export const HEADER_READ_BYTES: number = MIN_CLUSTER_SIZE

/** A header whose every offset and size is within the file, with its tables in Varve's order. */
export interface ParsedHeader extends HeaderFields {
  readonly backing: BackingFile | undefined
}

/** Checks and reads a header; `bytes` are the first {@link HEADER_READ_BYTES} of the file, or all that it has. */
export function parseHeader(bytes: Uint8Array, fileSize: number): ParsedHeader {
  if (bytes.length < MIN_HEADER_LENGTH) throw invalid(`A file of ${fileSize} bytes holds no qcow2 header.`)
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)
  if (view.getUint32(Field.magic) !== MAGIC) throw invalid('Not a qcow2 image.')
  const version = view.getUint32(Field.version)
  if (version !== VERSION) throw unsupported(`A qcow2 image of version ${version}; Varve reads version 3.`)
  refuseFeatures(view)

  const clusterSize = 2 ** view.getUint32(Field.clusterBits)
  if (clusterSize < MIN_CLUSTER_SIZE || clusterSize > MAX_CLUSTER_SIZE)
    throw unsupported(`Clusters of 2^${view.getUint32(Field.clusterBits)} bytes; Varve writes 2^12 to 2^21.`)

  const virtualSize = readNumber(view, Field.size, 'size of the disk')
  if (virtualSize % SECTOR_SIZE !== 0)
    throw unsupported(`A disk of ${virtualSize} bytes, which is no multiple of ${SECTOR_SIZE}.`)

  const headerLength = view.getUint32(Field.headerLength)
  if (headerLength < MIN_HEADER_LENGTH || headerLength % 8 !== 0)
    throw invalid(`A header of ${headerLength} bytes.`)
  if (headerLength > bytes.length)
    throw headerLength > fileSize
      ? invalid(`A header of ${headerLength} bytes in a file of ${fileSize}.`)
      : unsupported(`A header of ${headerLength} bytes.`)
  if (headerLength > Field.compressionType && view.getUint8(Field.compressionType) !== 0)
    throw unsupported('Its compression type is not the default one.')

  const refcountTableClusters = view.getUint32(Field.refcountTableClusters)
  const l1Entries = view.getUint32(Field.l1Size)
  const refcountTableOffset = readNumber(view, Field.refcountTableOffset, 'offset of the refcount table')
  const l1Offset = readNumber(view, Field.l1Offset, 'offset of the L1 table')
  const header = { clusterSize, virtualSize, refcountTableOffset, refcountTableClusters, l1Offset, l1Entries }
  checkTables(header, fileSize)
  const parsed = { ...header, backing: parseBacking(bytes, view, headerLength) }
  // What is left has no name here: compatible and autoclear features, another header length or place of the name.
  const written = headerBytes(parsed)
  if (Buffer.compare(bytes.subarray(0, written.length), written) !== 0)
    throw unsupported('Its header has something in it that Varve does not write.')
  return parsed
}

const INCOMPATIBLE = [
  'it was not closed properly (dirty)',
  'it is marked as corrupt',
  'its data is in an external file',
  'it has a compression type of its own',
  'it has extended L2 entries',
]

/** Refuses what changes the meaning of the rest, and what Varve never writes. */
function refuseFeatures(view: DataView): void {
  const high = view.getUint32(Field.incompatible)
  const low = view.getUint32(Field.incompatible + 4)
  INCOMPATIBLE.forEach((feature, bit) => {
    if (low & (1 << bit)) throw unsupported(`Varve does not read this image: ${feature}.`)
  })
  if (high !== 0 || low !== 0) throw unsupported('It has incompatible features that are not known.')
  if (view.getUint32(Field.encryption) !== 0) throw unsupported('It is encrypted.')
  if (view.getUint32(Field.snapshots) !== 0) throw unsupported('It holds internal snapshots.')
  const refcountOrder = view.getUint32(Field.refcountOrder)
  if (refcountOrder !== REFCOUNT_ORDER)
    throw unsupported(`Refcounts of 2^${refcountOrder} bits; Varve writes 2^4.`)
}

type Tables = Omit<HeaderFields, 'backing'>

/** The tables are aligned, whole, within the file, and in Varve's order; so none overlaps another. */
function checkTables(header: Tables, fileSize: number): void {
  const { clusterSize, virtualSize, refcountTableOffset, refcountTableClusters, l1Offset, l1Entries } = header
  const needed = Math.ceil(virtualSize / (clusterSize * (clusterSize / ENTRY_BYTES)))
  if (l1Entries * ENTRY_BYTES > MAX_L1_BYTES) throw invalid(`An L1 table of ${l1Entries} entries.`)
  if (l1Entries < needed)
    throw invalid(`An L1 table of ${l1Entries} entries for a disk that needs ${needed}.`)
  if (l1Entries > needed) throw unsupported(`An L1 table of ${l1Entries} entries where ${needed} are needed.`)

  const refcountTableBytes = refcountTableClusters * clusterSize
  if (refcountTableBytes === 0 || refcountTableBytes > MAX_REFCOUNT_TABLE_BYTES)
    throw invalid(`A refcount table of ${refcountTableClusters} clusters.`)
  const refcountTableEnd = refcountTableOffset + refcountTableBytes
  const l1End = l1Offset + l1Entries * ENTRY_BYTES
  for (const [name, offset, end] of [
    ['refcount table', refcountTableOffset, refcountTableEnd],
    ['L1 table', l1Offset, l1End],
  ] as const) {
    if (offset % clusterSize !== 0) throw invalid(`The ${name} is at ${offset}, inside a cluster.`)
    if (offset < clusterSize) throw invalid(`The ${name} is at ${offset}, in the header.`)
    if (end > fileSize)
      throw invalid(`The ${name} ends at ${end}, after the file's ${fileSize} bytes: the file is cut short.`)
  }
  if (refcountTableOffset > clusterSize)
    throw unsupported(
      `The refcount table is at ${refcountTableOffset}; Varve writes it right after the header.`,
    )
  if (l1Offset < refcountTableEnd) throw invalid('The L1 table and the refcount table overlap.')
}

/** Walks the header's extensions, and takes the backing file's name and format. */
function parseBacking(bytes: Uint8Array, view: DataView, headerLength: number): BackingFile | undefined {
  const nameOffset = readNumber(view, Field.backingNameOffset, 'offset of the backing file name')
  const nameLength = view.getUint32(Field.backingNameLength)
  const extensionsEnd = nameOffset === 0 ? bytes.length : nameOffset
  if (nameOffset !== 0) {
    if (nameLength === 0 || nameLength > MAX_BACKING_NAME_BYTES)
      throw invalid(`A backing file name of ${nameLength} bytes.`)
    if (nameOffset < headerLength) throw invalid(`The backing file name is at ${nameOffset}, in the header.`)
    if (nameOffset + nameLength > bytes.length)
      throw invalid(`The backing file name is at ${nameOffset}, too far behind the header.`)
  }

  let format: string | undefined
  for (let at = headerLength; at + 8 <= extensionsEnd; ) {
    const type = view.getUint32(at)
    const length = view.getUint32(at + 4)
    if (type === HeaderExtension.end) break
    at += 8
    if (length > extensionsEnd - at) throw invalid(`A header extension of ${length} bytes.`)
    if (type === HeaderExtension.bitmaps) throw unsupported('It holds bitmaps.')
    if (type === HeaderExtension.dataFile) throw unsupported('Its data is in an external file.')
    if (type === HeaderExtension.encryption) throw unsupported('It is encrypted.')
    if (type !== HeaderExtension.backingFormat)
      throw unsupported(`It has a header extension of the type 0x${type.toString(16)}.`)
    format = readText(bytes.subarray(at, at + length), 'format')
    at += Math.ceil(length / 8) * 8
  }

  if (nameOffset === 0) {
    if (nameLength !== 0) throw invalid(`A backing file name of ${nameLength} bytes that is nowhere.`)
    if (format !== undefined) throw invalid('It has a backing format and no backing file.')
    return undefined
  }
  if (format === undefined) throw unsupported('It does not say what format its backing file has.')
  if (format !== 'qcow2' && format !== 'raw')
    throw unsupported(`Its backing file is of the format ${JSON.stringify(format.slice(0, 20))}.`)
  return { name: readText(bytes.subarray(nameOffset, nameOffset + nameLength), 'name'), format }
}

function readText(bytes: Uint8Array, what: 'name' | 'format'): string {
  let text: string
  try {
    text = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(bytes)
  } catch {
    throw invalid(`The backing file's ${what} is not UTF-8.`)
  }
  if (text.includes('\0')) throw invalid(`The backing file's ${what} has a zero byte in it.`)
  return text
}

function readNumber(view: DataView, at: number, what: string): number {
  const value = view.getUint32(at) * 0x1_0000_0000 + view.getUint32(at + 4)
  if (!Number.isSafeInteger(value)) throw invalid(`The ${what} is over 2^53.`)
  return value
}

function invalid(message: string): Qcow2Error {
  return new Qcow2Error('QCOW2_INVALID', message)
}

function unsupported(message: string): Qcow2Error {
  return new Qcow2Error('QCOW2_UNSUPPORTED', message)
}
