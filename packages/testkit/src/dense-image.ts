import { randomBytes } from 'node:crypto'
import { writeFile } from 'node:fs/promises'

const CLUSTER = 64 * 1024
/** Distinct data clusters. A prime, so that nothing repeats with a power of two, as tables and parts do. */
const DATA_CLUSTERS = 61
const ENTRIES = CLUSTER / 8
/** Refcounts have 16 bits, and some clusters are shared by twice as many as others. */
const LARGEST = 64 * 2 ** 30

/**
 * Makes a qcow2 image of a few MiB whose guest sees `size` bytes of random data, without a hole: all of its clusters
 * are stored in a few that are shared, as internal snapshots share theirs, and hardly any follows its neighbour. For uploads
 * that are large, and maps that are long, at no cost.
 *
 * @param size a multiple of 64 KiB, at most 64 GiB
 */
export async function createDenseQcow2(path: string, size: number): Promise<void> {
  if (size % CLUSTER !== 0 || size <= 0 || size > LARGEST) throw new RangeError(`not a size: ${size}`)
  const count = size / CLUSTER
  const tables = Math.ceil(count / ENTRIES)
  // the header, the refcount table, its one block, the L1 table, the L2 tables, the data
  const data = 4 + tables
  const image = Buffer.alloc((data + DATA_CLUSTERS) * CLUSTER)
  const at = (cluster: number) => cluster * CLUSTER
  const entry = (table: number, index: number, value: bigint) =>
    image.writeBigUInt64BE(value, at(table) + index * 8)
  const refer = (cluster: number) => {
    const place = at(2) + cluster * 2
    image.writeUInt16BE(image.readUInt16BE(place) + 1, place)
  }

  writeHeader(image, { size, l1Size: tables })
  for (let cluster = 0; cluster < data; cluster++) refer(cluster)
  entry(1, 0, BigInt(at(2)))
  for (let table = 0; table < tables; table++) entry(3, table, BigInt(at(4 + table)) | (1n << 63n))
  randomBytes(DATA_CLUSTERS * CLUSTER).copy(image, at(data))
  for (let guest = 0; guest < count; guest++) {
    const cluster = data + ((guest * guest + 7 * guest) % DATA_CLUSTERS)
    refer(cluster)
    entry(4 + Math.floor(guest / ENTRIES), guest % ENTRIES, BigInt(at(cluster)))
  }
  await writeFile(path, image)
}

/** Of version 3, with the refcount table in cluster 1 and the L1 table in cluster 3 (docs/interop/qcow2 of QEMU). */
function writeHeader(image: Buffer, { size, l1Size }: { size: number; l1Size: number }): void {
  image.write('QFI\xfb', 0, 'latin1')
  image.writeUInt32BE(3, 4)
  image.writeUInt32BE(Math.log2(CLUSTER), 20)
  image.writeBigUInt64BE(BigInt(size), 24)
  image.writeUInt32BE(l1Size, 36)
  image.writeBigUInt64BE(BigInt(3 * CLUSTER), 40)
  image.writeBigUInt64BE(BigInt(CLUSTER), 48)
  image.writeUInt32BE(1, 56)
  image.writeUInt32BE(4, 96) // refcounts of 16 bits
  image.writeUInt32BE(104, 100)
}
