import { open, realpath, stat } from 'node:fs/promises'
import { z } from 'zod'
import { diskMark, type FoundBitmap, joinTwins, ownerOf, sealOf, twinOf } from './bitmap-twin.ts'
import { runCommand } from './command.ts'
import { countBitmapBits } from './count-bitmap-bits.ts'
import { isVarveError, VarveError } from './errors.ts'
import type { BitmapChange, DiskPlace, FileDisk } from './host.ts'
import { saysLocked } from './image-lock.ts'
import { parseOutput } from './parse-output.ts'
import type { RunOptions } from './run-options.ts'

const imageInfo = z.object({
  format: z.string(),
  'virtual-size': z.number().int().nonnegative(),
  'backing-filename': z.string().optional(),
  'full-backing-filename': z.string().optional(),
  'format-specific': z
    .object({
      data: z.object({
        compat: z.string().optional(),
        'data-file': z.string().optional(),
        bitmaps: z
          .array(z.object({ name: z.string(), granularity: z.number(), flags: z.array(z.string()) }))
          .optional(),
      }),
    })
    .optional(),
})

/** What `qemu-img info` says of an image that nobody writes to. */
export interface ImageInfo {
  readonly format: string
  readonly virtualSize: number
  readonly backing?: string
  readonly dataFile?: string
  /** The qcow2 version: `0.10` or `1.1`. */
  readonly compat?: string
  readonly bitmaps: readonly FoundBitmap[]
}

/**
 * Looks at an image.
 *
 * @param format the image's format; without one QEMU guesses from its content
 * @throws DISK_BUSY when a running instance writes to it, DISK_NOT_FOUND, DISK_UNSUPPORTED
 */
export async function readImageInfo(
  path: string,
  format: string | undefined,
  run: RunOptions,
): Promise<ImageInfo> {
  const args = ['info', '--output=json', ...(format ? ['-f', format] : []), path]
  const { stdout } = await runCommand('qemu-img', args, run).catch(error => {
    throw imageError(path, error)
  })
  const info = parseOutput(imageInfo, stdout, 'qemu-img info')
  const data = info['format-specific']?.data
  const backing = info['full-backing-filename'] ?? info['backing-filename']
  const bitmaps = data?.bitmaps ?? []
  const counts = bitmaps.length > 0 ? await countBitmapBits(path) : undefined
  return {
    format: info.format,
    virtualSize: info['virtual-size'],
    ...(backing !== undefined && { backing }),
    ...(data?.['data-file'] !== undefined && { dataFile: data['data-file'] }),
    ...(data?.compat !== undefined && { compat: data.compat }),
    bitmaps: bitmaps.map(({ name, granularity, flags }) => {
      const dirty = counts?.get(name)
      const plain = {
        name,
        granularity,
        enabled: flags.includes('auto'),
        inconsistent: flags.includes('in-use'),
      }
      return { ...plain, ...(dirty !== undefined && { dirty }) }
    }),
  }
}

function imageError(path: string, error: unknown): unknown {
  if (!isVarveError(error, 'COMMAND_FAILED')) return error
  const stderr = String(error.context.stderr ?? '')
  const context = { path, stderr }
  if (saysLocked(stderr)) {
    return new VarveError(
      'DISK_BUSY',
      `The image ${path} is in use by another process. Stop the virtual machine that uses it, or back it up by its libvirt name.`,
      {
        context,
        cause: error,
        retryable: true,
      },
    )
  }
  if (stderr.includes('No such file')) {
    return new VarveError('DISK_NOT_FOUND', `There is no image ${path}. Check the path.`, {
      context,
      cause: error,
    })
  }
  return new VarveError(
    'DISK_UNSUPPORTED',
    `The image ${path} cannot be read: ${error.message}. See that it is a whole image of the format that is stated for it ("qemu-img check" tells), and that its file is readable.`,
    {
      context,
      cause: error,
    },
  )
}

/** Of a bitmap that is there for its name: the largest that QEMU takes is 2 GiB. */
const STOPPED_GRANULARITY = 2 ** 30

/** A disk of an instance that does not run. */
export async function readOfflineDisk(
  name: string,
  path: string,
  format: 'qcow2' | 'raw',
  run: RunOptions,
): Promise<FileDisk> {
  const resolved = await resolveDisk(name, path)
  return offlineDisk(name, resolved, format, await readImageInfo(resolved, format, run))
}

/** The same for an image that was looked at already, whose `info` has that format. */
export async function offlineDisk(
  name: string,
  path: string,
  format: 'qcow2' | 'raw',
  info: ImageInfo,
): Promise<FileDisk> {
  const resolved = await resolveDisk(name, path)
  return {
    name,
    path: resolved,
    format,
    blockDevice: (await stat(resolved)).isBlockDevice(),
    virtualSize: info.virtualSize,
    bitmaps: joinTwins(info.bitmaps, await diskMark(name, resolved)),
    ...(info.dataFile !== undefined && { dataFile: info.dataFile }),
    holdsBitmaps: format === 'qcow2' && info.compat !== '0.10',
  }
}

/** The path of a disk's file with symbolic links resolved. @throws DISK_NOT_FOUND */
export async function resolveDisk(name: string, path: string): Promise<string> {
  return realpath(path).catch(error => {
    throw new VarveError('DISK_NOT_FOUND', `The disk ${name} has no file at ${path}. Check the path.`, {
      context: { disk: name, path },
      cause: error,
    })
  })
}

/**
 * Adds a persistent, recording bitmap and its twin to the image of a disk, which nobody has open. One that is there already
 * is kept.
 */
export async function addImageBitmap(
  { name: disk, path }: DiskPlace,
  bitmap: { readonly name: string; readonly granularity: number },
  run: RunOptions,
): Promise<void> {
  await addIfMissing(path, bitmap, run)
  await addIfMissing(path, { ...bitmap, name: twinOf(bitmap.name, await diskMark(disk, path)) }, run)
}

async function addIfMissing(
  path: string,
  { name, granularity }: { readonly name: string; readonly granularity: number },
  run: RunOptions,
): Promise<void> {
  const options = ['--add', '-g', String(granularity), '-f', 'qcow2']
  await changeBitmap(path, [...options, path, name], run).catch(async error => {
    if (!isVarveError(error, 'COMMAND_FAILED')) throw error
    // Only now: it is seldom there, and the look takes as long. It also tells of an image that is in use, or gone.
    const { bitmaps } = await readImageInfo(path, 'qcow2', run)
    if (!bitmaps.some(present => present.name === name)) throw error
  })
}

/** Adds a persistent bitmap that records nothing to an image that nobody has open. */
export async function addStoppedBitmap(path: string, name: string, run: RunOptions): Promise<void> {
  const options = ['--add', '--disable', '-g', String(STOPPED_GRANULARITY), '-f', 'qcow2']
  await changeBitmap(path, [...options, path, name], run)
}

/** Seals a bitmap of an image that nobody has open, and removes others; see {@link Host.changeBitmaps}. */
export async function changeImageBitmaps(
  path: string,
  { seal: sealed, remove }: BitmapChange,
  run: RunOptions,
): Promise<void> {
  const info = await readImageInfo(path, 'qcow2', run).catch(async error => {
    // One that was converted to another format in its place took them along.
    if (isVarveError(error, 'DISK_UNSUPPORTED') && !(await isQcow2(path))) return undefined
    throw error
  })
  const present = info?.bitmaps ?? []
  const seal = sealed === undefined ? undefined : sealOf(sealed, present)
  if (seal) {
    const actions = ['--add', '-g', String(seal.granularity), '--disable', '--merge', seal.from]
    await changeBitmap(path, [...actions, '-f', 'qcow2', path, seal.name], run)
  }
  const removed = present.map(({ name }) => name).filter(name => remove.includes(ownerOf(name)))
  await removeImageBitmaps(path, removed, run)
}

/** Removes bitmaps, which are there, from an image that nobody has open. */
export async function removeImageBitmaps(
  path: string,
  names: readonly string[],
  run: RunOptions,
): Promise<void> {
  for (const name of names) await changeBitmap(path, ['--remove', '-f', 'qcow2', path, name], run)
}

/** Whether a file begins as a qcow2 image does. */
export async function isQcow2(path: string): Promise<boolean> {
  await using file = await open(path)
  const { bytesRead, buffer } = await file.read(Buffer.alloc(4), 0, 4, 0)
  return bytesRead === 4 && buffer.toString('latin1') === 'QFI\xfb'
}

async function changeBitmap(path: string, args: readonly string[], run: RunOptions): Promise<void> {
  try {
    await runCommand('qemu-img', ['bitmap', ...args], run)
  } catch (error) {
    if (!isVarveError(error, 'COMMAND_FAILED')) throw error
    throw new VarveError(
      'COMMAND_FAILED',
      `The image ${path} does not take the bitmap that its backups need: ${error.message}. See that it may be written, that its file system is not mounted read-only and has room, and try again.`,
      { context: { ...error.context, path }, cause: error },
    )
  }
}
