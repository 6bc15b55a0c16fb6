import { ClusterMap } from './cluster-map.ts'
import { Qcow2Error } from './errors.ts'
import type { ExtentList } from './extent-list.ts'
import {
  ENTRY_BYTES,
  MAX_BACKING_NAME_BYTES,
  MAX_CLUSTER_SIZE,
  MAX_L1_BYTES,
  MAX_REFCOUNT_TABLE_BYTES,
  MIN_CLUSTER_SIZE,
  REFCOUNT_BYTES,
  SECTOR_SIZE,
} from './format.ts'
import { headerBytes } from './header-bytes.ts'
import { ImageLayout } from './image-layout.ts'
import { TableRuns } from './table-runs.ts'

/** The image that an incremental one rests on. */
export interface BackingFile {
  /** Its path, relative to the folder of the image; at most 1023 bytes of UTF-8. */
  readonly name: string
  /** Its format. It is written in the image, so that nobody has to guess it. */
  readonly format: 'qcow2' | 'raw'
}

/** Options of {@link planImage}. */
export interface ImageOptions {
  /** Bytes in a cluster: a power of two from 4096 to 2097152. Default: 65536. */
  readonly clusterSize?: number
  /** What unallocated runs read from. Default: nothing; the image is a full one. */
  readonly backing?: BackingFile
}

/**
 * Lays out a qcow2 image (version 3, 16-bit refcounts) of a disk. The same extents and options give the same
 * bytes. Memory grows with the number of extents, not with the disk.
 *
 * Every run of `extents` begins at a multiple of the cluster size. QEMU cuts a disk's size down to a multiple
 * of 512; so that no byte is lost, a size that is none is rounded up, and the added bytes belong to the last run.
 *
 * Without a backing file a run of zeros needs no space and is left unallocated; with one it becomes explicit
 * zero clusters, which hide what the backing file holds.
 *
 * Throws `QCOW2_ARGUMENT` for options outside their limits, for extents inside a cluster, for a disk that
 * needs an L1 table over 32 MiB or a refcount table over 8 MiB, which QEMU would not open (both need a larger
 * cluster size), and for one over 2^53 bytes.
 */
export function planImage(extents: ExtentList, options: ImageOptions = {}): ImageLayout {
  const { clusterSize = 65536, backing } = options
  checkClusterSize(clusterSize)
  if (backing) checkBacking(backing)

  const perTable = clusterSize / ENTRY_BYTES
  const virtualSize = Math.ceil(extents.size / SECTOR_SIZE) * SECTOR_SIZE
  const l1Entries = Math.ceil(virtualSize / (clusterSize * perTable))
  if (virtualSize > maxDiskSize(clusterSize)) {
    throw new Qcow2Error(
      'QCOW2_ARGUMENT',
      `A disk of ${virtualSize} bytes needs an L1 table over 32 MiB with clusters of ${clusterSize} bytes. Use larger clusters.`,
      { virtualSize, clusterSize },
    )
  }

  const map = new ClusterMap(extents, clusterSize, backing !== undefined)
  const tables = new TableRuns(map, perTable)
  const l1Clusters = Math.ceil((l1Entries * ENTRY_BYTES) / clusterSize)
  const refcounts = sizeRefcounts(1 + l1Clusters + tables.tables + map.dataClusters, clusterSize)
  if (refcounts.tableClusters * clusterSize > MAX_REFCOUNT_TABLE_BYTES) {
    throw new Qcow2Error(
      'QCOW2_ARGUMENT',
      `${map.dataClusters} data clusters of ${clusterSize} bytes need a refcount table over 8 MiB. Use larger clusters.`,
      { virtualSize, clusterSize },
    )
  }

  const refcountTable = clusterSize // after the header's cluster
  const refcountBlocks = refcountTable + refcounts.tableClusters * clusterSize
  const l1 = refcountBlocks + refcounts.blocks * clusterSize
  const l2 = l1 + l1Clusters * clusterSize
  const data = l2 + tables.tables * clusterSize
  if (!Number.isSafeInteger(Math.max(virtualSize, data + map.dataClusters * clusterSize)))
    throw new Qcow2Error('QCOW2_ARGUMENT', 'The disk or its image is over 2^53 bytes.', { virtualSize })
  return new ImageLayout({
    clusterSize,
    virtualSize,
    extentsSize: extents.size,
    header: headerBytes({
      clusterSize,
      virtualSize,
      refcountTableOffset: refcountTable,
      refcountTableClusters: refcounts.tableClusters,
      l1Offset: l1,
      l1Entries,
      backing,
    }),
    sections: { refcountTable, refcountBlocks, l1, l2, data },
    refcountBlocks: refcounts.blocks,
    map,
    tables,
  })
}

/**
 * The largest disk, in bytes, that an image with clusters of `clusterSize` bytes can hold: its L1 table is 32 MiB then.
 * One that is nearly so large and nearly full may still need a larger refcount table than there can be.
 */
export function maxDiskSize(clusterSize: number): number {
  return (MAX_L1_BYTES / ENTRY_BYTES) * (clusterSize / ENTRY_BYTES) * clusterSize
}

/** The refcount table and blocks for `others` clusters and for themselves. */
function sizeRefcounts(others: number, clusterSize: number): { tableClusters: number; blocks: number } {
  for (let blocks = 0; ; ) {
    const tableClusters = Math.ceil((blocks * ENTRY_BYTES) / clusterSize)
    const total = others + tableClusters + blocks
    const needed = Math.ceil(total / (clusterSize / REFCOUNT_BYTES))
    if (needed === blocks) return { tableClusters, blocks }
    blocks = needed
  }
}

function checkClusterSize(clusterSize: number): void {
  const inRange = clusterSize >= MIN_CLUSTER_SIZE && clusterSize <= MAX_CLUSTER_SIZE
  if (inRange && Number.isInteger(Math.log2(clusterSize))) return
  throw new Qcow2Error(
    'QCOW2_ARGUMENT',
    `Not a cluster size: ${clusterSize}. It is a power of two from 4096 to 2097152.`,
    { clusterSize },
  )
}

function checkBacking({ name, format }: BackingFile): void {
  const length = Buffer.byteLength(name)
  if (length === 0 || length > MAX_BACKING_NAME_BYTES || name.includes('\0')) {
    throw new Qcow2Error(
      'QCOW2_ARGUMENT',
      `Not a backing file name: ${JSON.stringify(name.slice(0, 100))}. It has 1 to 1023 bytes, none of them zero.`,
      { length },
    )
  }
  // QEMU takes what is before a colon in the first part of a path for a protocol, such as nbd: or json:.
  if (/^[^/]*:/.test(name)) {
    throw new Qcow2Error(
      'QCOW2_ARGUMENT',
      `QEMU would take the backing file name ${JSON.stringify(name.slice(0, 100))} for an address. Begin it with "./".`,
      { length },
    )
  }
  if (format !== 'qcow2' && format !== 'raw')
    throw new Qcow2Error('QCOW2_ARGUMENT', `Not a backing format: ${String(format)}.`)
}
