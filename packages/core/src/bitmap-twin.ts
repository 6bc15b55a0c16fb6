import type { DiskBitmap } from './host.ts'

/** A bitmap as QEMU tells it, be it a backup's or a twin. */
export interface FoundBitmap extends Omit<DiskBitmap, 'twin'> {
  /** How much of the disk it says was written: bytes or bits. Absent where that cannot be told. */
  readonly dirty?: number
}

const PREFIX = 'varve-'
const SUFFIX = '-twin'

/**
 * The bitmap that is begun with a backup's own, and records the same writes. QEMU does not tell that a bitmap was cleared,
 * made anew or stopped for a while; but then it lacks what its twin has.
 */
export function twinOf(bitmap: string): string {
  return `${bitmap}${SUFFIX}`
}

/** Joins bitmaps that were found on a disk, at one moment, with their twins. */
export function joinTwins(found: readonly FoundBitmap[]): DiskBitmap[] {
  const byName = new Map(found.map(bitmap => [bitmap.name, bitmap]))
  return found.flatMap(bitmap => {
    const { dirty, ...plain } = bitmap
    const main = nameOfMain(bitmap.name)
    if (main === undefined) return { ...plain, twin: compare(bitmap, byName.get(twinOf(bitmap.name))) }
    return byName.has(main) ? [] : { ...plain, name: main, twin: 'alone' }
  })
}

/** What a bitmap and its twin are called on the disk, as far as they are there. */
export function namesOnDisk({ name, twin }: DiskBitmap): string[] {
  if (twin === 'alone') return [twinOf(name)]
  return twin === 'missing' ? [name] : [name, twinOf(name)]
}

/**
 * A bitmap that was cleared has a part of what its twin has: as many are all. It may have more, of writes in between when
 * the two were begun.
 */
function compare(bitmap: FoundBitmap, twin: FoundBitmap | undefined): DiskBitmap['twin'] {
  if (!twin) return 'missing'
  const isComparable = twin.enabled && !twin.inconsistent && twin.granularity === bitmap.granularity
  if (!isComparable || bitmap.dirty === undefined || twin.dirty === undefined) return 'differs'
  return bitmap.dirty >= twin.dirty ? 'agrees' : 'differs'
}

function nameOfMain(name: string): string | undefined {
  return name.startsWith(PREFIX) && name.endsWith(SUFFIX) ? name.slice(0, -SUFFIX.length) : undefined
}
