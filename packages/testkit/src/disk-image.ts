import { createHash } from 'node:crypto'
import { createReadStream } from 'node:fs'
import { pipeline } from 'node:stream/promises'
import { execa } from 'execa'

const timeout = 120_000

/** The image formats that the lab deals with. */
export type ImageFormat = 'qcow2' | 'raw'

/** An image file, or what QEMU takes for one, such as `rbd:pool/image:conf=/etc/ceph/ceph.conf`. */
export interface DiskImage {
  /** Its file. */
  readonly path: string
  /** Its format. */
  readonly format: ImageFormat
}

/** Makes an empty qcow2 image of `size` bytes. */
export async function createQcow2(path: string, size: number): Promise<void> {
  await execa('qemu-img', ['create', '-q', '-f', 'qcow2', path, String(size)], { timeout })
}

/** Makes a sparse raw image of `size` bytes. */
export async function createRaw(path: string, size: number): Promise<void> {
  await execa('qemu-img', ['create', '-q', '-f', 'raw', path, String(size)], { timeout })
}

/**
 * Runs `qemu-io` commands on an image that nothing else has open, such as `write -P 0x22 1M 64k`,
 * `write -z 0 1M` or `discard 2M 1M`. Sizes take the suffixes k, M, G. With `isOpen` another program may have the image
 * open, and the commands only read.
 */
export async function qemuIo(
  path: string,
  format: ImageFormat,
  commands: readonly string[],
  options: { isOpen?: boolean } = {},
): Promise<string> {
  const args = [...(options.isOpen ? ['-r', '-U'] : []), ...commands.flatMap(command => ['-c', command])]
  const { stdout } = await execa('qemu-io', ['-d', 'unmap', '-f', format, ...args, path], { timeout })
  // It reports a failed command and a read of another pattern on its output and may still exit with 0.
  if (/failed|error|invalid/i.test(stdout)) throw new Error(`qemu-io on ${path}: ${stdout}`)
  return stdout
}

/** Whether `qemu-img compare` finds the same content, and what it says. */
export async function compareImages(
  first: DiskImage,
  second: DiskImage,
): Promise<{ identical: boolean; message: string }> {
  const args = ['compare', '-f', first.format, '-F', second.format, first.path, second.path]
  const { exitCode, stdout, stderr } = await execa('qemu-img', args, { reject: false, timeout })
  if (exitCode !== 0 && exitCode !== 1) throw new Error(`qemu-img compare failed: ${stderr}`)
  return { identical: exitCode === 0, message: stdout }
}

/** Rejects when `qemu-img check` finds an error or a leak. */
export async function checkQcow2(path: string): Promise<void> {
  await execa('qemu-img', ['check', '-f', 'qcow2', path], { timeout })
}

/** SHA-256 of a file as it is, in hex. */
export async function sha256File(path: string): Promise<string> {
  const hash = createHash('sha256')
  await pipeline(createReadStream(path, { highWaterMark: 1024 * 1024 }), hash)
  return hash.digest('hex')
}

/** SHA-256 of the content that a guest sees in an image, in hex: what `sha256sum /dev/vda` prints there. */
export async function sha256Content(path: string, format: ImageFormat): Promise<string> {
  const hash = createHash('sha256')
  const copy = execa('nbdcopy', toStandardOutput(path, format), {
    timeout,
    buffer: false,
    encoding: 'buffer',
  })
  await Promise.all([copy, pipeline(copy.stdout, hash)])
  return hash.digest('hex')
}

/** The content that a guest sees in an image, all of it in memory. */
export async function readContent({ path, format }: DiskImage): Promise<Buffer> {
  const args = toStandardOutput(path, format)
  const { stdout } = await execa('nbdcopy', args, { timeout, encoding: 'buffer', maxBuffer: 2 ** 30 })
  return Buffer.from(stdout.buffer, stdout.byteOffset, stdout.byteLength)
}

/** qemu-img cannot write into a pipe; nbdcopy reads any format through a qemu-nbd of its own. */
function toStandardOutput(path: string, format: ImageFormat): string[] {
  return ['--', '[', 'qemu-nbd', '--read-only', '--persistent', '-f', format, path, ']', '-']
}
