import { MAX_EXTENTS_PER_REPLY } from './protocol.ts'

/** The extents of one context in a block status reply: `[length, flags, length, flags, …]` in `pairs`. */
export interface StatusExtents {
  /** Twice the number of extents is used of it. */
  pairs: Uint32Array
  /** How many extents there are. */
  count: number
  /** Bytes that they cover together; the last may reach beyond the request. */
  covered: number
}

/** Adds an extent; memory grows with what has arrived. False when there are too many. */
export function appendStatus(extents: StatusExtents, length: number, flags: number): boolean {
  if (extents.count === MAX_EXTENTS_PER_REPLY) return false
  const at = extents.count * 2
  if (at === extents.pairs.length) {
    const larger = new Uint32Array(at * 2)
    larger.set(extents.pairs)
    extents.pairs = larger
  }
  extents.pairs[at] = length
  extents.pairs[at + 1] = flags
  extents.count++
  extents.covered += length
  return true
}

/** No extents yet. */
export function emptyStatus(): StatusExtents {
  return { pairs: new Uint32Array(32), count: 0, covered: 0 }
}
