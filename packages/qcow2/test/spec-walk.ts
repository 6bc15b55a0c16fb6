/**
 * A plain reader of qcow2 bytes, written from the format's specification and sharing nothing with the code:
 * the oracle of tests that run without QEMU.
 */
export interface SpecImage {
  readonly clusterSize: number
  readonly disk: Buffer
  /** What each guest cluster is: an offset in the file, 'zero' or 'unallocated'. */
  readonly clusters: (number | 'zero' | 'unallocated')[]
  readonly backingName: string | undefined
}

const OFFSET = 0x00fffffffffffe00n
const COPIED = 1n << 63n

/** What an image reads as; unallocated clusters as in `parent`, zeros beyond its end. */
export function walk(file: Buffer, parent: Uint8Array = Buffer.alloc(0)): SpecImage {
  const clusterSize = 1 << file.readUInt32BE(20)
  const size = Number(file.readBigUInt64BE(24))
  const l1 = Number(file.readBigUInt64BE(40))
  const nameOffset = Number(file.readBigUInt64BE(8))
  const disk = Buffer.alloc(size)
  disk.set(parent.subarray(0, size))
  const clusters: SpecImage['clusters'] = []
  for (let at = 0; at < size; at += clusterSize) {
    const cluster = at / clusterSize
    const l2 = file.readBigUInt64BE(l1 + Math.floor(cluster / (clusterSize / 8)) * 8) & OFFSET
    const entry = l2 === 0n ? 0n : file.readBigUInt64BE(Number(l2) + (cluster % (clusterSize / 8)) * 8)
    const offset = Number(entry & OFFSET)
    const end = Math.min(size, at + clusterSize)
    if (entry & 1n) {
      disk.fill(0, at, end)
      clusters.push('zero')
    } else if (offset !== 0) {
      file.copy(disk, at, offset, offset + end - at)
      clusters.push(offset)
    } else clusters.push('unallocated')
  }
  const backingName =
    nameOffset === 0 ? undefined : file.toString('utf8', nameOffset, nameOffset + file.readUInt32BE(16))
  return { clusterSize, disk, clusters, backingName }
}

/** Complaints about an image's refcounts: every cluster of the file is used exactly once and counted so. */
export function checkRefcounts(file: Buffer): string[] {
  const clusterSize = 1 << file.readUInt32BE(20)
  const total = file.length / clusterSize
  const used = new Map<number, number>()
  const use = (offset: number, length: number): void => {
    for (let at = offset; at < offset + length; at += clusterSize)
      used.set(at / clusterSize, (used.get(at / clusterSize) ?? 0) + 1)
  }
  const copied = (entry: bigint, what: string): void => {
    if (!(entry & COPIED)) complaints.push(`${what} is not marked as used once`)
  }
  const complaints: string[] = []
  if (!Number.isInteger(total)) complaints.push('the file ends inside a cluster')

  use(0, clusterSize)
  const refcountTable = Number(file.readBigUInt64BE(48))
  const refcountTableBytes = file.readUInt32BE(56) * clusterSize
  use(refcountTable, refcountTableBytes)
  const l1 = Number(file.readBigUInt64BE(40))
  const l1Entries = file.readUInt32BE(36)
  use(l1, l1Entries * 8)
  for (let i = 0; i < l1Entries; i++) {
    const l1Entry = file.readBigUInt64BE(l1 + i * 8)
    if (l1Entry === 0n) continue
    copied(l1Entry, `L1 entry ${i}`)
    const l2 = Number(l1Entry & OFFSET)
    use(l2, clusterSize)
    let empty = true
    for (let j = 0; j < clusterSize; j += 8) {
      const entry = file.readBigUInt64BE(l2 + j)
      if (entry !== 0n) empty = false
      if ((entry & OFFSET) === 0n) continue
      copied(entry, `L2 entry ${i}, ${j / 8}`)
      use(Number(entry & OFFSET), clusterSize)
    }
    if (empty) complaints.push(`the L2 table of L1 entry ${i} is not needed`)
  }
  for (let i = 0; i < refcountTableBytes; i += 8) {
    const block = Number(file.readBigUInt64BE(refcountTable + i))
    if (block !== 0) use(block, clusterSize)
  }
  for (let i = 0; i < refcountTableBytes; i += 8) {
    const block = Number(file.readBigUInt64BE(refcountTable + i))
    if (block === 0) continue
    for (let j = 0; j < clusterSize / 2; j++) {
      const cluster = (i / 8) * (clusterSize / 2) + j
      const refcount = file.readUInt16BE(block + j * 2)
      const uses = used.get(cluster) ?? 0
      if (refcount !== uses) complaints.push(`cluster ${cluster}: refcount ${refcount}, used ${uses} times`)
      if (refcount > 0 && cluster >= total) complaints.push(`cluster ${cluster} is after the end`)
      if (refcount === 0 && cluster < total) complaints.push(`cluster ${cluster} is used by nothing`)
      used.delete(cluster)
    }
  }
  if (used.size > 0) complaints.push(`${used.size} clusters have no refcount`)
  return complaints
}
