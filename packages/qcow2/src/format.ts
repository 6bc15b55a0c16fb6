// Numbers of the qcow2 format, from QEMU's docs/interop/qcow2.txt, and the limits that QEMU sets
// (block/qcow2.h: QCOW_MAX_L1_SIZE, QCOW_MAX_REFTABLE_SIZE, QCOW2_MAX_BACKING_FILE_SIZE).

/** "QFI\xfb", the first four bytes. */
export const MAGIC = 0x514649fb

/** The version that is written and read. */
export const VERSION = 3

/** Bytes of the fixed header that Varve writes: 104 of version 3, the compression type and padding. */
export const HEADER_LENGTH = 112

/** The least header of version 3. */
export const MIN_HEADER_LENGTH = 104

/** 16 bits a refcount: 2 ** 4. */
export const REFCOUNT_ORDER = 4

/** Bytes of a 16-bit refcount. */
export const REFCOUNT_BYTES = 2

/** Bytes of an entry in the refcount table, in an L1 and in an L2 table. */
export const ENTRY_BYTES = 8

/** The smallest cluster that Varve writes, in bytes. */
export const MIN_CLUSTER_SIZE = 4096

/** The largest cluster of the format, in bytes. */
export const MAX_CLUSTER_SIZE: number = 2 * 1024 * 1024

/** The largest L1 table that QEMU opens, in bytes. */
export const MAX_L1_BYTES: number = 32 * 1024 * 1024

/** The largest refcount table that QEMU opens, in bytes. */
export const MAX_REFCOUNT_TABLE_BYTES: number = 8 * 1024 * 1024

/** The longest backing file name, in bytes. */
export const MAX_BACKING_NAME_BYTES = 1023

/** QEMU counts a disk in sectors and cuts off what is left over. */
export const SECTOR_SIZE = 512

/** Types of header extensions. */
export const HeaderExtension = {
  end: 0x00000000,
  backingFormat: 0xe2792aca,
  bitmaps: 0x23852875,
  dataFile: 0x44415441,
  encryption: 0x0537be77,
} as const

/** Bit 63, in the upper half of an L1 or L2 entry: the refcount is exactly one. */
export const COPIED_HIGH = 0x80000000

/** Bit 62, in the upper half of an L2 entry: a compressed cluster. */
export const COMPRESSED_HIGH = 0x40000000

/** Bit 0, in the lower half of an L2 entry: the cluster reads as zero. */
export const ZERO_LOW = 0x00000001

/** Where the fields of the header are; all big-endian. */
export const Field = {
  magic: 0,
  version: 4,
  backingNameOffset: 8,
  backingNameLength: 16,
  clusterBits: 20,
  size: 24,
  encryption: 32,
  l1Size: 36,
  l1Offset: 40,
  refcountTableOffset: 48,
  refcountTableClusters: 56,
  snapshots: 60,
  snapshotsOffset: 64,
  incompatible: 72,
  compatible: 80,
  autoclear: 88,
  refcountOrder: 96,
  headerLength: 100,
  compressionType: 104,
} as const
