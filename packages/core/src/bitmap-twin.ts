import { createHash } from 'node:crypto'
import { stat } from 'node:fs/promises'
import type { DiskBitmap } from './host.ts'

/** A bitmap as QEMU tells it, be it a backup's or a twin. */
export interface FoundBitmap extends Omit<DiskBitmap, 'twin' | 'names'> {
  /** How much of the disk it says was written: bytes or bits. Absent where that cannot be told. */
  readonly dirty?: number
}

const TWIN = /^(varve-.+)-twin-[0-9a-z]+$/

/**
 * Tells a file from any other that has been under its path. libvirt puts copies of an image's bitmaps, all of them and empty,
 * into the overlay of a snapshot, and an overlay may be made again and again under one name.
 */
export async function fileMark(path: string): Promise<string> {
  const file = await stat(path, { bigint: true })
  // Its node is made anew at each boot. No snapshot makes one, so its path has to do.
  if (file.isBlockDevice()) return 'device'
  // A number may be used again once its file is gone, and then with another time.
  return createHash('sha256').update(`${file.ino} ${file.birthtimeNs}`).digest('hex').slice(0, 12)
}

/**
 * The bitmap that is begun with a backup's own, and records the same writes. QEMU does not tell that a bitmap was cleared,
 * made anew or stopped for a while; but then it lacks what its twin has. Nor does it tell that a bitmap is a copy; but
 * then its twin bears the mark of another file.
 */
export function twinOf(bitmap: string, file: string): string {
  return `${bitmap}-twin-${file}`
}

/** Joins bitmaps that were found on a disk, at one moment, with their twins. `file` is the disk's {@link fileMark}. */
export function joinTwins(found: readonly FoundBitmap[], file: string): DiskBitmap[] {
  const isTwin = ({ name }: FoundBitmap) => TWIN.test(name)
  const twins = Map.groupBy(found.filter(isTwin), ({ name }) => name.replace(TWIN, '$1'))
  const joined = found
    .filter(bitmap => !isTwin(bitmap))
    .map((bitmap): DiskBitmap => {
      const { dirty, ...plain } = bitmap
      const own = twins.get(bitmap.name) ?? []
      twins.delete(bitmap.name)
      return { ...plain, twin: compare(bitmap, own, file), names: [bitmap, ...own].map(({ name }) => name) }
    })
  for (const [name, alone] of twins) {
    for (const { dirty, ...plain } of alone.slice(0, 1))
      joined.push({ ...plain, name, twin: 'alone', names: alone.map(({ name }) => name) })
  }
  return joined
}

/**
 * A bitmap that was cleared has a part of what its twin has: as many are all. It may have more, of writes in between when
 * the two were begun.
 */
function compare(bitmap: FoundBitmap, twins: readonly FoundBitmap[], file: string): DiskBitmap['twin'] {
  if (twins.length === 0) return 'missing'
  const twin = twins.find(({ name }) => name === twinOf(bitmap.name, file))
  if (!twin) return 'foreign'
  const isComparable = twin.enabled && !twin.inconsistent && twin.granularity === bitmap.granularity
  if (!isComparable || bitmap.dirty === undefined || twin.dirty === undefined) return 'differs'
  return bitmap.dirty >= twin.dirty ? 'agrees' : 'differs'
}
