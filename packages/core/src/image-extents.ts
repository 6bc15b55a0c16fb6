import { ExtentKind, ExtentList } from '@varve/qcow2'
import { type Runs, STATE_ZERO } from './data-map.ts'
import type { RangeList } from './range-list.ts'

/** QEMU's NBD interop document, "qemu:dirty-bitmap:": written since the bitmap began. */
const STATE_DIRTY = 1

/** What {@link imageExtents} is given. */
export interface ImageExtentsOptions {
  /** The disk's size in bytes. */
  size: number
  /** Bytes of a cluster of the image. */
  clusterSize: number
  /** The context `base:allocation`. */
  allocation: Runs
  /** For an increment: the parent's bitmap, the size that the disk had then, and where it had data that is lost. */
  since?: { dirty: Runs; size: number; lost: RangeList }
}

/**
 * What each cluster of a backup image is. A cluster with any data in it is stored whole, so a bitmap may be
 * finer than a cluster.
 *
 * - full: data, or unallocated where the disk reads as zero;
 * - increment: data or an *explicit* zero where the cluster is dirty, unallocated where it is clean. A dirty
 *   cluster that now reads as zero must hide what the parent has there, so it is never left out. What lies
 *   beyond the parent's size is dirty: bitmaps show grown regions as clean. So is what has lost its data: see
 *   {@link LostData}.
 */
export function imageExtents(options: ImageExtentsOptions): ExtentList {
  const { size, clusterSize, allocation, since } = options
  const extents = new ExtentList()
  const zero = since ? ExtentKind.zero : ExtentKind.unallocated
  const isDirty = since && dirtyCursor(since, size)
  const hasData = cursor(allocation, flags => (flags & STATE_ZERO) === 0)

  for (let start = 0; start < size; ) {
    // One step covers every cluster up to the next change of either map.
    const end = Math.min(start + clusterSize, size)
    const dirty = isDirty?.(start, end) ?? { any: true, until: size }
    const data = hasData(start, end)
    const same = Math.max(end, floorTo(Math.min(dirty.until, data.until), clusterSize, size))
    extents.append(same - start, !dirty.any ? ExtentKind.unallocated : data.any ? ExtentKind.data : zero)
    start = same
  }
  return extents
}

function floorTo(offset: number, clusterSize: number, size: number): number {
  return offset >= size ? size : offset - (offset % clusterSize)
}

/** Whether any byte of a range matches, and up to where every later byte is as the range's last one, when the range is uniform. */
interface Coverage {
  readonly any: boolean
  readonly until: number
}

/** Looks at ascending ranges of a map, each extent once. */
function cursor(map: Runs, matches: (flags: number) => boolean): (start: number, end: number) => Coverage {
  let i = 0
  const endOf = (index: number) => map.start(index) + map.length(index)
  return (start, end) => {
    while (endOf(i) <= start) i++
    if (endOf(i) >= end) return { any: matches(map.flags(i)), until: endOf(i) }
    let any = false
    for (let k = i; k < map.count && map.start(k) < end; k++) any ||= matches(map.flags(k))
    return { any, until: end }
  }
}

function dirtyCursor(
  { dirty, size: parentSize, lost }: NonNullable<ImageExtentsOptions['since']>,
  size: number,
): (start: number, end: number) => Coverage {
  const inBitmap = cursor(dirty, flags => (flags & STATE_DIRTY) !== 0)
  const isLost = rangeCursor(lost)
  return (start, end) => {
    if (end > parentSize) return { any: true, until: start >= parentSize ? size : end }
    const [written, gone] = [inBitmap(start, end), isLost(start, end)]
    return { any: written.any || gone.any, until: Math.min(written.until, gone.until, parentSize) }
  }
}

/** As {@link cursor}, of ranges. */
function rangeCursor(ranges: RangeList): (start: number, end: number) => Coverage {
  let i = 0
  return (start, end) => {
    while (i < ranges.count && ranges.end(i) <= start) i++
    const next = i < ranges.count ? ranges.start(i) : Number.POSITIVE_INFINITY
    if (next >= end) return { any: false, until: next }
    return { any: true, until: next <= start ? Math.max(end, ranges.end(i)) : end }
  }
}
