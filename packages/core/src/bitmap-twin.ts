import { createHash } from 'node:crypto'
import { readFile, stat } from 'node:fs/promises'
import { join } from 'node:path'
import type { DiskBitmap } from './host.ts'

/** A bitmap as QEMU tells it, be it a backup's or a twin. */
export interface FoundBitmap extends Omit<DiskBitmap, 'twin' | 'names'> {
  /** How many of its bits are set. Absent where that cannot be told. */
  readonly dirty?: number
}

const TWIN = /^(varve-.+)-twin-[0-9a-z]+$/
const SEAL = /^(varve-.+)-seal$/

/**
 * Ties a bitmap to the disk that it is of, by the disk's target name and its file. All disks of a backup have a bitmap of one
 * name, and files, or the names of devices, may be exchanged between two backups. And libvirt puts copies of an image's
 * bitmaps, all of them and empty, into the overlay of a snapshot.
 *
 * @param file the disk's {@link fileIdentity}
 */
export function twinMark(disk: string, file: string): string {
  return createHash('sha256').update(`${disk} ${file}`).digest('hex').slice(0, 12)
}

/** Tells a file from any other that has been under its path: an overlay may be made again and again under one name. */
export async function fileIdentity(path: string): Promise<string> {
  const file = await stat(path, { bigint: true })
  if (file.isBlockDevice()) return deviceIdentity(sysfsFolder(file.rdev))
  // A number may be used again once its file is gone, and then with another time.
  return `${file.ino} ${file.birthtimeNs}`
}

/**
 * What tells a block device whatever its node, which is made anew at each boot, is called by then: the device mapper's uuid,
 * such as of an LVM volume, or the name that it has from its maker. Where it has neither its path has to do.
 *
 * @param sysfs the kernel's folder of the device
 */
export async function deviceIdentity(sysfs: string): Promise<string> {
  const names = ['dm/uuid', 'wwid', 'device/wwid']
  const found = await Promise.all(names.map(name => readFile(join(sysfs, name), 'utf8').catch(() => '')))
  return `device ${found.map(text => text.trim()).find(text => text !== '') ?? ''}`
}

/** As the kernel's `new_encode_dev` puts the two numbers of a device into one. */
function sysfsFolder(rdev: bigint): string {
  const major = (rdev >> 8n) & 0xfffn
  const minor = (rdev & 0xffn) | ((rdev >> 12n) & 0xfff00n)
  return `/sys/dev/block/${major}:${minor}`
}

/** The {@link twinMark} of a disk whose file is at `path`. */
export async function diskMark(disk: string, path: string): Promise<string> {
  return twinMark(disk, await fileIdentity(path))
}

/**
 * The bitmap that is begun with a backup's own, and records the same writes. QEMU does not tell that a bitmap was cleared,
 * made anew or stopped for a while; but then it lacks what its twin has. Nor does it tell that a bitmap is a copy, or of
 * another disk; but then its twin bears another {@link twinMark}.
 */
export function twinOf(bitmap: string, mark: string): string {
  return `${bitmap}-twin-${mark}`
}

/** A bitmap to be made: it records nothing, and begins with the bits that another one on the disk has. */
export interface Seal {
  readonly name: string
  /** The other one. */
  readonly from: string
  readonly granularity: number
}

/**
 * What shows that bitmaps were cleared, or stopped and set going again, where a bitmap and its twin were alike: a third one
 * that is stopped from the beginning and has bits, so that it has none once it was cleared. Its bits are those of the bitmap
 * on the disk, whosever it is, that has the most: QEMU sets none without a write. Undefined where none has any, or the bitmap is sealed already, or not there.
 */
export function sealOf(bitmap: string, found: readonly FoundBitmap[]): Seal | undefined {
  const own = found.find(({ name }) => name === bitmap)
  if (!own || found.some(({ name }) => SEAL.exec(name)?.[1] === bitmap)) return undefined
  const { granularity } = own
  const bits = ({ dirty = 0 }: FoundBitmap) => dirty
  const [most] = found
    .filter(
      other => other.granularity === granularity && !other.inconsistent && other.name.startsWith('varve-'),
    )
    .toSorted((one, other) => bits(other) - bits(one))
  if (!most || bits(most) === 0) return undefined
  return { name: `${bitmap}-seal`, from: most.name, granularity }
}

/** The bitmap that a twin or a seal belongs to; any other bitmap belongs to itself. */
export function ownerOf(name: string): string {
  return name.replace(TWIN, '$1').replace(SEAL, '$1')
}

/**
 * Joins bitmaps that were found on a disk, at one moment, with their twins and seals. `mark` is the disk's {@link twinMark}.
 */
export function joinTwins(found: readonly FoundBitmap[], mark: string): DiskBitmap[] {
  const joined: DiskBitmap[] = []
  for (const [name, own] of Map.groupBy(found, bitmap => ownerOf(bitmap.name))) {
    const bitmap = own.find(bitmap => bitmap.name === name)
    const [first] = own
    if (!first) continue
    const { dirty, ...plain } = bitmap ?? first
    const twin = bitmap ? compare(bitmap, own, mark) : 'alone'
    joined.push({ ...plain, name, twin, names: own.map(({ name }) => name) })
  }
  return joined
}

/**
 * A bitmap that was cleared has a part of what its twin has: as many are all. It may have more, of writes in between when
 * the two were begun.
 */
function compare(bitmap: FoundBitmap, own: readonly FoundBitmap[], mark: string): DiskBitmap['twin'] {
  const twins = own.filter(({ name }) => TWIN.test(name))
  if (twins.length === 0) return 'missing'
  const twin = twins.find(({ name }) => name === twinOf(bitmap.name, mark))
  if (!twin) return 'foreign'
  const isComparable = twin.enabled && !twin.inconsistent && twin.granularity === bitmap.granularity
  if (!isComparable || bitmap.dirty === undefined || twin.dirty === undefined) return 'differs'
  return bitmap.dirty >= twin.dirty && own.every(isWhole) ? 'agrees' : 'differs'
}

/**
 * Whether a bitmap is no seal, or one that nobody has set going and that has bits, as far as that can be told. It may have
 * fewer than it began with: QEMU cuts it when the disk shrinks.
 */
function isWhole({ name, enabled, dirty }: FoundBitmap): boolean {
  return !SEAL.test(name) || (!enabled && dirty !== 0)
}
