import { gunzipSync, zstdDecompressSync } from 'node:zlib'
import { execa } from 'execa'

// Of the header of a bzImage, by the kernel's "The Linux/x86 Boot Protocol" (Documentation/arch/x86/boot.rst).
const SETUP_SECTORS = 0x1f1
const MAGIC = 0x202
const VERSION = 0x206
const PAYLOAD_OFFSET = 0x248
const PAYLOAD_LENGTH = 0x24c

/** What a compressed kernel may begin with, and what takes it apart. */
const FORMATS: [magic: string, decompress: (payload: Buffer) => Uint8Array | Promise<Uint8Array>][] = [
  ['1f8b', payload => gunzipSync(payload)],
  ['28b52ffd', payload => zstdDecompressSync(payload)],
  ['fd377a585a00', payload => filter('xz', payload)],
  ['02214c18', payload => filter('lz4', payload)],
]

/**
 * The kernel within a bzImage, as QEMU boots it by itself (PVH): in software emulation a kernel that has to decompress
 * itself takes a third longer to boot. Undefined where the image is compressed in another way.
 */
export async function unpackKernel(bzImage: Buffer): Promise<Uint8Array | undefined> {
  // The payload is in the header since version 2.08.
  if (bzImage.toString('latin1', MAGIC, MAGIC + 4) !== 'HdrS' || bzImage.readUInt16LE(VERSION) < 0x208) return
  const start = ((bzImage[SETUP_SECTORS] || 4) + 1) * 512 + bzImage.readUInt32LE(PAYLOAD_OFFSET)
  const end = start + bzImage.readUInt32LE(PAYLOAD_LENGTH) - 4 // followed by the size that it unpacks to
  const payload = bzImage.subarray(start, end)
  const format = FORMATS.find(([magic]) => payload.toString('hex', 0, magic.length / 2) === magic)
  const kernel = await format?.[1](payload)
  if (kernel && kernel.byteLength !== bzImage.readUInt32LE(end))
    throw new Error('The kernel was not unpacked whole.')
  return kernel
}

async function filter(program: string, input: Uint8Array): Promise<Uint8Array> {
  const options = { input, encoding: 'buffer', maxBuffer: 1024 ** 3, timeout: 30_000 } as const
  return (await execa(program, ['--decompress', '--stdout'], options)).stdout
}
