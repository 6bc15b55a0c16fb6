import { type FileHandle, open } from 'node:fs/promises'

// QEMU's qcow2 specification: "Header", "Header extensions", "Bitmaps".
const MAGIC = 0x514649fb
const HEADER_BYTES = 104
const BITMAPS_EXTENSION = 0x23852875
const ENTRY_BYTES = 24
const OFFSET_MASK = 0x00ff_ffff_ffff_fe00n
/** The largest directory, and table of a bitmap, that QEMU opens. */
const MAX_BYTES = 64 * 1024 * 1024

/**
 * The number of bits that are set in each bitmap of a qcow2 image which nobody writes to, by the bitmap's name; no QEMU
 * tool tells it. Bitmaps that cannot be read are left out.
 */
export async function countBitmapBits(path: string): Promise<ReadonlyMap<string, number>> {
  const counts = new Map<string, number>()
  await using file = await open(path)
  const header = await read(file, 0, HEADER_BYTES)
  if (!header || header.readUInt32BE(0) !== MAGIC || header.readUInt32BE(4) < 3) return counts
  const clusterBits = header.readUInt32BE(20)
  if (clusterBits < 9 || clusterBits > 21) return counts
  const clusterSize = 2 ** clusterBits
  const size = Number(header.readBigUInt64BE(24))
  const directory = await readDirectory(file, header.readUInt32BE(100), clusterSize)
  for (let at = 0; directory && at + ENTRY_BYTES <= directory.length; ) {
    const nameBytes = directory.readUInt16BE(at + 18)
    const nameAt = at + ENTRY_BYTES + directory.readUInt32BE(at + 20)
    const bits = Math.ceil(size / 2 ** directory.readUInt8(at + 17))
    const table = await readTable(file, directory, at)
    const count = table && (await countBits(file, table, clusterSize, bits))
    const name = directory.subarray(nameAt, nameAt + nameBytes).toString('utf8')
    if (count !== undefined) counts.set(name, count)
    at = Math.ceil((nameAt + nameBytes) / 8) * 8
  }
  return counts
}

async function readDirectory(
  file: FileHandle,
  headerBytes: number,
  clusterSize: number,
): Promise<Buffer | undefined> {
  const first = await read(file, 0, clusterSize)
  if (!first) return undefined
  for (let at = headerBytes; at + 8 <= first.length; ) {
    const type = first.readUInt32BE(at)
    const length = first.readUInt32BE(at + 4)
    if (type === 0) return undefined
    if (type === BITMAPS_EXTENSION && length >= 24 && at + 32 <= first.length) {
      const directoryBytes = Number(first.readBigUInt64BE(at + 16))
      return read(file, Number(first.readBigUInt64BE(at + 24)), directoryBytes)
    }
    at += 8 + Math.ceil(length / 8) * 8
  }
  return undefined
}

function readTable(file: FileHandle, directory: Buffer, at: number): Promise<Buffer | undefined> {
  return read(file, Number(directory.readBigUInt64BE(at)), directory.readUInt32BE(at + 8) * 8)
}

async function countBits(
  file: FileHandle,
  table: Buffer,
  clusterSize: number,
  bits: number,
): Promise<number | undefined> {
  let count = 0
  for (let at = 0, left = bits; at < table.length; at += 8, left -= clusterSize * 8) {
    const entry = table.readBigUInt64BE(at)
    const offset = Number(entry & OFFSET_MASK)
    if (offset === 0) {
      if ((entry & 1n) === 1n) count += Math.max(0, Math.min(clusterSize * 8, left)) // all of them
      continue
    }
    const cluster = await read(file, offset, clusterSize)
    if (!cluster) return undefined
    for (const byte of cluster) for (let rest = byte; rest !== 0; rest &= rest - 1) count++
  }
  return count
}

/** Undefined where the file does not have all of the bytes, or they are too many. */
async function read(file: FileHandle, offset: number, length: number): Promise<Buffer | undefined> {
  if (length > MAX_BYTES || !Number.isSafeInteger(offset)) return undefined
  const buffer = Buffer.alloc(length)
  const { bytesRead } = await file.read(buffer, 0, length, offset)
  return bytesRead === length ? buffer : undefined
}
