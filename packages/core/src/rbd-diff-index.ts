import { ExtentKind, ImageExtents } from '@varve/qcow2'
import { VarveError } from './errors.ts'
import type { RbdDiff } from './rbd.ts'
import { ByteWriter, VarintReader } from './varint.ts'

/** What is taken of a diff stream, and of its index, at most. */
export const RBD_DIFF_LIMITS = {
  /** The longest name of a snapshot, in bytes. RBD itself knows no limit. */
  nameBytes: 1024,
  /**
   * The runs of one diff: 512 MiB of memory. A full one has one for each object of the image, which reaches to 128 TiB.
   */
  runs: 33_554_432,
  /** The largest image: 4 PiB. */
  imageBytes: 4_503_599_627_370_496,
} as const

const MAGIC = 'varve rbd index\n'
const VERSION = 1
const HEADER_BYTES = 40
const encoder = new TextEncoder()

/**
 * An {@link RbdDiff} as bytes, to be stored beside its stream: whoever restores it need not read the whole stream to
 * find its records. The same diff always gives the same bytes; a range takes 4 to 8 of them as a rule.
 *
 * Little-endian: 16 bytes `varve rbd index\n`, le32 version (1), le64 size of the image, le64 size of the stream,
 * le16 and le16 the lengths of the names of the snapshots it starts from (0: none) and leads to, both names in
 * UTF-8, then the ranges in ascending order. Each is two or three integers in LEB128: the bytes of the image between
 * the range before and this one; the bytes of this one, times two, plus one for data; for data, the bytes of the
 * stream between the data before and this.
 */
export function encodeDiffIndex(diff: RbdDiff): Uint8Array {
  const from = encoder.encode(diff.fromSnapshot ?? '')
  const to = encoder.encode(diff.toSnapshot)
  const header = Buffer.alloc(HEADER_BYTES)
  header.write(MAGIC, 'latin1')
  header.writeUInt32LE(VERSION, 16)
  header.writeBigUInt64LE(BigInt(diff.size), 20)
  header.writeBigUInt64LE(BigInt(diff.streamSize), 28)
  header.writeUInt16LE(from.length, 36)
  header.writeUInt16LE(to.length, 38)
  const writer = new ByteWriter()
  for (const bytes of [header, from, to]) writer.bytes(bytes)

  const { extents } = diff
  let gap = 0
  let dataEnd = 0
  for (let i = 0; i < extents.count; i++) {
    const length = extents.length(i)
    const kind = extents.kind(i)
    if (kind === ExtentKind.unallocated) {
      gap = length
      continue
    }
    const isData = kind === ExtentKind.data
    writer.varint(gap)
    writer.varint(length * 2 + (isData ? 1 : 0))
    if (isData) {
      const offset = extents.fileOffset(i)
      writer.varint(offset - dataEnd)
      dataEnd = offset + length
    }
    gap = 0
  }
  return writer.written
}

/**
 * Reads what {@link encodeDiffIndex} gave. The bytes are untrusted: no range may leave the image or overlap, no data
 * may leave the stream, and time and memory are bounded by the bytes that there are.
 *
 * @throws RBD_STREAM_INVALID
 */
export function decodeDiffIndex(bytes: Uint8Array): RbdDiff {
  const { size, streamSize, fromSnapshot, toSnapshot, end } = decodeHeader(bytes)
  const reader = new VarintReader(bytes, end)
  const extents = new ImageExtents()
  let covered = 0
  let dataEnd = 0
  let dataSize = 0
  while (reader.left > 0) {
    const gap = reader.next()
    const lengthAndKind = reader.next()
    const isData = lengthAndKind % 2 === 1
    const length = Math.floor(lengthAndKind / 2)
    const offset = isData ? dataEnd + reader.next() : -1
    // written so that a NaN is refused
    if (!(gap <= size - covered && length >= 1 && length <= size - covered - gap))
      throw invalid('a range leaves the image')
    if (isData && !(offset + length < streamSize)) throw invalid('the data of a range leaves the stream')
    if (extents.count >= RBD_DIFF_LIMITS.runs)
      throw invalid(`it has more than ${RBD_DIFF_LIMITS.runs} ranges`)
    if (gap > 0) extents.append(gap, ExtentKind.unallocated, -1)
    extents.append(length, isData ? ExtentKind.data : ExtentKind.zero, offset)
    covered += gap + length
    if (isData) {
      dataEnd = offset + length
      dataSize += length
    }
  }
  if (covered < size) extents.append(size - covered, ExtentKind.unallocated, -1)
  return {
    ...(fromSnapshot !== '' && { fromSnapshot }),
    toSnapshot,
    size,
    streamSize,
    dataSize,
    extents,
  }
}

function decodeHeader(bytes: Uint8Array) {
  const header = Buffer.from(bytes.buffer, bytes.byteOffset, Math.min(bytes.length, HEADER_BYTES))
  if (header.length < HEADER_BYTES || header.toString('latin1', 0, 16) !== MAGIC)
    throw invalid('it does not begin as one')
  const version = header.readUInt32LE(16)
  if (version !== VERSION) throw invalid(`it is of version ${version}, which only a newer Varve can read`)
  const size = Number(header.readBigUInt64LE(20))
  const streamSize = Number(header.readBigUInt64LE(28))
  if (size > RBD_DIFF_LIMITS.imageBytes || !Number.isSafeInteger(streamSize))
    throw invalid('a size is too large')
  const fromEnd = HEADER_BYTES + header.readUInt16LE(36)
  const end = fromEnd + header.readUInt16LE(38)
  if (end > bytes.length) throw invalid('it is cut short')
  const fromSnapshot = decodeName(bytes.subarray(HEADER_BYTES, fromEnd))
  const toSnapshot = decodeName(bytes.subarray(fromEnd, end))
  if (toSnapshot === '') throw invalid('it names no snapshot that the stream leads to')
  return { size, streamSize, fromSnapshot, toSnapshot, end }
}

function decodeName(bytes: Uint8Array): string {
  if (bytes.length > RBD_DIFF_LIMITS.nameBytes) throw invalid(`a snapshot's name has ${bytes.length} bytes`)
  try {
    return new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(bytes)
  } catch {
    throw invalid("a snapshot's name is no UTF-8")
  }
}

function invalid(what: string): VarveError {
  return new VarveError(
    'RBD_STREAM_INVALID',
    `The index of an RBD diff stream is damaged or forged: ${what}. Put it back from a copy of the storage, or use another backup.`,
  )
}
