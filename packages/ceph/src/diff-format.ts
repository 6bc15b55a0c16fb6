/**
 * The diff format v1 of RBD, as `rbd export-diff` writes it (docs.ceph.com, "RBD Incremental Backup"): a banner,
 * then records of one tag byte each, little-endian, and an end mark. Nothing in it is a checksum.
 */
export const BANNER = 'rbd diff v1\n'

/** The tags of records. */
export const Tag = {
  /** The snapshot it starts from: le32 length, name. */
  from: 0x66,
  /** The snapshot it leads to: le32 length, name. */
  to: 0x74,
  /** The image's size at the latter: le64. */
  size: 0x73,
  /** Data: le64 offset, le64 length, bytes. */
  write: 0x77,
  /** A range that reads as zeros: le64 offset, le64 length. */
  zero: 0x7a,
  /** The end. */
  end: 0x65,
} as const
