import { type FileHandle, open } from 'node:fs/promises'

const OFFSET_OF_ENTRY = 0x00ff_ffff_ffff_fe00n // docs/interop/qcow2 of QEMU, "L1 table entry"

/**
 * Lays a qcow2 image's clusters in its file the other way round, as if its guest had written from the end: no two that
 * follow each other for the guest do so in the file. What the guest sees is turned round as well, cluster by cluster.
 *
 * @param path an image without compressed clusters, internal snapshots or subclusters, that nothing has open
 */
export async function scatterQcow2(path: string): Promise<void> {
  const file = await open(path, 'r+')
  try {
    const header = await readAt(file, 0, 48)
    const clusterSize = 2 ** header.readUInt32BE(20)
    const l1 = entriesOf(await readAt(file, Number(header.readBigUInt64BE(40)), header.readUInt32BE(36) * 8))
    const tables = [...l1].map(entry => Number(entry & OFFSET_OF_ENTRY)).filter(offset => offset !== 0)
    const all = entriesOf(Buffer.concat(await Promise.all(tables.map(at => readAt(file, at, clusterSize)))))
    const used = all.filter(entry => entry !== 0n).reverse()
    let next = 0
    const turned = bytesOf(all.map(entry => (entry === 0n ? 0n : (used[next++] ?? 0n))))
    for (const [index, at] of tables.entries()) await file.write(turned, index * clusterSize, clusterSize, at)
  } finally {
    await file.close()
  }
}

async function readAt(file: FileHandle, offset: number, length: number): Promise<Buffer> {
  const { buffer, bytesRead } = await file.read(Buffer.alloc(length), 0, length, offset)
  if (bytesRead < length) throw new Error(`The image ends within its tables, at ${offset + bytesRead}.`)
  return buffer
}

function entriesOf(bytes: Buffer): BigUint64Array {
  return BigUint64Array.from({ length: bytes.length / 8 }, (_, index) => bytes.readBigUInt64BE(index * 8))
}

function bytesOf(entries: BigUint64Array): Buffer {
  const bytes = Buffer.alloc(entries.length * 8)
  for (const [index, entry] of entries.entries()) bytes.writeBigUInt64BE(entry, index * 8)
  return bytes
}
