/** A part of one block. */
export interface BlockEdge {
  /** Where the block begins, in bytes. */
  readonly block: number
  /** The first byte of the part. */
  readonly start: number
  /** The first byte after the part. */
  readonly end: number
}

/** A range, cut where blocks begin. */
export interface BlockSplit {
  /** What consists of whole blocks, or ends with the export; empty when `start` is not below `end`. */
  readonly aligned: { readonly start: number; readonly end: number }
  /** What is left at the edges: at most one part of a block before and one after. */
  readonly edges: readonly BlockEdge[]
}

/** Cuts the bytes `start` to `end` of an export of `size` bytes at blocks of `blockSize` bytes. */
export function splitAtBlocks(start: number, end: number, blockSize: number, size: number): BlockSplit {
  const firstBlock = start - (start % blockSize)
  const lastBlock = end - (end % blockSize)
  const alignedStart = start === firstBlock ? start : firstBlock + blockSize
  const alignedEnd = end === size && lastBlock >= alignedStart ? end : lastBlock
  const edges: BlockEdge[] = []
  if (start < alignedStart) edges.push({ block: firstBlock, start, end: Math.min(alignedStart, end) })
  if (alignedEnd < end && lastBlock >= alignedStart) edges.push({ block: lastBlock, start: lastBlock, end })
  return { aligned: { start: alignedStart, end: alignedEnd }, edges }
}
