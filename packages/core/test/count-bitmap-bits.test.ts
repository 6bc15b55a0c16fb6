import { mkdtemp, readFile, rm, truncate, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, expect, test } from 'vitest'
import { countBitmapBits } from '../src/count-bitmap-bits.ts'

// Images as QEMU's qcow2 specification has them, with clusters of 512 bytes, of which one holds 4,096 bits. What QEMU itself
// writes, bitmap-altered.lab.test.ts counts.

const CLUSTER = 512
const BITS = CLUSTER * 8
const MiB = 1024 * 1024

let folder: string
let path: string
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'varve-bits-'))
  path = join(folder, 'image')
})
afterEach(() => rm(folder, { recursive: true }))

interface Bitmap {
  readonly name: string
  readonly granularityBits?: number
  /** Each the bytes of a cluster, or all zeros, or all ones. */
  readonly table: readonly (Buffer | 'zeros' | 'ones')[]
  readonly extraBytes?: number
}

interface Image {
  /** Of the disk, in bytes. */
  readonly size?: number
  readonly version?: number
  readonly clusterBits?: number
  readonly headerBytes?: number
  /** Before that of the bitmaps. */
  readonly extensions?: readonly Buffer[]
  readonly bitmaps: readonly Bitmap[]
  /** Changes the extension of the bitmaps before it is written. */
  readonly change?: (extension: Buffer) => void
}

/** An extension of a header, padded. */
function extension(type: number, data: Buffer): Buffer {
  const bytes = Buffer.alloc(8 + Math.ceil(data.length / 8) * 8)
  bytes.writeUInt32BE(type, 0)
  bytes.writeUInt32BE(data.length, 4)
  data.copy(bytes, 8)
  return bytes
}

/** Writes an image: its header in the first cluster, then what its bitmaps are made of, each part on clusters of its own. */
async function write(image: Image): Promise<void> {
  const { size = MiB, version = 3, clusterBits = 9, headerBytes = 104, extensions = [], bitmaps } = image
  const parts: Buffer[] = [Buffer.alloc(CLUSTER)]
  const place = (bytes: Buffer): number => {
    const at = parts.reduce((sum, part) => sum + part.length, 0)
    parts.push(bytes, Buffer.alloc(-bytes.length & (CLUSTER - 1)))
    return at
  }
  const entries = bitmaps.map(({ name, granularityBits = 9, table, extraBytes = 0 }) => {
    const pointers = Buffer.alloc(table.length * 8)
    for (const [index, part] of table.entries()) {
      const ones = part === 'ones' ? 1 : 0
      pointers.writeBigUInt64BE(BigInt(typeof part === 'string' ? ones : place(part)), index * 8)
    }
    const entry = Buffer.alloc(Math.ceil((24 + extraBytes + name.length) / 8) * 8)
    entry.writeBigUInt64BE(BigInt(place(pointers)), 0)
    entry.writeUInt32BE(table.length, 8)
    entry.writeUInt8(1, 16)
    entry.writeUInt8(granularityBits, 17)
    entry.writeUInt16BE(name.length, 18)
    entry.writeUInt32BE(extraBytes, 20)
    entry.write(name, 24 + extraBytes)
    return entry
  })
  const directory = Buffer.concat(entries)
  const data = Buffer.alloc(24)
  data.writeUInt32BE(bitmaps.length, 0)
  data.writeBigUInt64BE(BigInt(directory.length), 8)
  data.writeBigUInt64BE(BigInt(place(directory)), 16)
  const ofBitmaps = extension(0x23852875, data)
  image.change?.(ofBitmaps)

  const header = Buffer.alloc(headerBytes)
  header.write('QFI\xfb', 'latin1')
  header.writeUInt32BE(version, 4)
  header.writeUInt32BE(clusterBits, 20)
  header.writeBigUInt64BE(BigInt(size), 24)
  header.writeUInt32BE(headerBytes, 100)
  Buffer.concat([header, ...extensions, ofBitmaps]).copy(parts[0] ?? header)
  await writeFile(path, Buffer.concat(parts))
}

/** A cluster that begins with these bytes. */
function cluster(...bytes: number[]): Buffer {
  return Buffer.concat([Buffer.from(bytes), Buffer.alloc(CLUSTER - bytes.length)])
}

const one: Bitmap = { name: 'one', table: [cluster(1)] }
const counted = async () => Object.fromEntries(await countBitmapBits(path))

test('the bits of every bitmap are counted, in clusters, and where all of them are alike', async () => {
  const size = 4 * BITS * 512
  await write({
    size,
    bitmaps: [
      {
        name: 'varve-1',
        table: [cluster(0xff, 0, 0x81), 'zeros', 'ones', cluster(...Array(512).fill(0x10))],
      },
      { name: 'none', table: ['zeros', 'zeros', 'zeros', 'zeros'], extraBytes: 8 },
      { name: 'coarse-one', granularityBits: 16, table: [cluster(0x7f)] },
      { name: 'empty', table: [] },
      one,
    ],
  })
  expect(await counted()).toStrictEqual({
    'varve-1': 10 + BITS + 512,
    none: 0,
    'coarse-one': 7,
    empty: 0,
    one: 1,
  })
})

test('of a cluster of ones the bits count that the disk has', async () => {
  await write({
    size: (BITS + 10) * 512 - 1, // the last bit stands for a part
    bitmaps: [
      { name: 'whole', table: ['ones', 'ones'] },
      { name: 'tail', table: ['zeros', 'ones'] },
      { name: 'beyond', table: ['zeros', 'zeros', 'ones'] },
      { name: 'coarse', granularityBits: 10, table: ['ones'] },
    ],
  })
  expect(await counted()).toStrictEqual({ whole: BITS + 10, tail: 10, beyond: 0, coarse: BITS / 2 + 5 })
})

test('the extension of the bitmaps is found behind others, and in a longer header', async () => {
  const others = [extension(0x6803f857, Buffer.alloc(13)), extension(0xe2792aca, Buffer.alloc(8))]
  await write({ bitmaps: [one], extensions: others, headerBytes: 112 })
  expect(await counted()).toStrictEqual({ one: 1 })
})

test('behind the end of the extensions nothing is looked for', async () => {
  await write({ bitmaps: [one], extensions: [extension(0, Buffer.alloc(0))] })
  expect(await counted()).toStrictEqual({})
})

test('an extension at the very end of the first cluster is read, and none that leaves it', async () => {
  const room = CLUSTER - 104 - 32
  await write({ bitmaps: [one], extensions: [extension(1, Buffer.alloc(room - 8))] })
  expect(await counted()).toStrictEqual({ one: 1 })
  await write({ bitmaps: [one], extensions: [extension(1, Buffer.alloc(room))] })
  expect(await counted()).toStrictEqual({})
})

test('an extension that is too short is none', async () => {
  await write({ bitmaps: [one], change: bytes => bytes.writeUInt32BE(23, 4) })
  expect(await counted()).toStrictEqual({})
})

test.each([
  ['of version 2', { version: 2 }],
  ['with clusters of 256 bytes', { clusterBits: 8 }],
  ['with clusters of 4 MiB', { clusterBits: 22 }],
])('an image %s has no bitmaps', async (_what, change) => {
  await write({ bitmaps: [one], ...change })
  await truncate(path, 8 * MiB) // so that nothing is too short
  expect(await counted()).toStrictEqual({})
})

test('clusters of 2 MiB are read', async () => {
  await write({ bitmaps: [{ name: 'ones', table: ['ones'] }], clusterBits: 21 })
  await truncate(path, 8 * MiB)
  expect(await counted()).toStrictEqual({ ones: MiB / 512 })
})

test('what is no qcow2 image, or ends too soon, has no bitmaps', async () => {
  await write({ bitmaps: [one] })
  await truncate(path, 103)
  expect(await counted()).toStrictEqual({})
  await write({ bitmaps: [one] })
  await truncate(path, CLUSTER - 1)
  expect(await counted()).toStrictEqual({})
  await write({ bitmaps: [one] })
  const other = await readFile(path)
  other.write('QED\0', 'latin1')
  await writeFile(path, other)
  expect(await counted()).toStrictEqual({})
  await writeFile(path, '')
  expect(await counted()).toStrictEqual({})
})

test('a bitmap whose table or cluster is not there is left out, and the others are counted', async () => {
  await write({ bitmaps: [{ name: 'lost', table: ['zeros', cluster(3)] }, one] })
  const bytes = await readFile(path)
  bytes.writeBigUInt64BE(BigInt(1024 * MiB), bytes.indexOf(pointerTo(bytes, cluster(3)))) // its cluster
  await writeFile(path, bytes)
  expect(await counted()).toStrictEqual({ one: 1 })

  await write({ bitmaps: [{ name: 'large', table: ['ones'] }, one] })
  const large = await readFile(path)
  large.writeBigUInt64BE(BigInt(MiB), entryOf(large, 'large'))
  large.writeUInt32BE(8 * MiB + 1, entryOf(large, 'large') + 8) // more than 64 MiB of zeros
  await writeFile(path, large)
  await truncate(path, 128 * MiB)
  expect(await counted()).toStrictEqual({ one: 1 })

  await write({ bitmaps: [{ name: 'far', table: ['ones'] }, one] })
  const far = await readFile(path)
  far.writeBigUInt64BE(2n ** 60n, entryOf(far, 'far')) // where no file reaches
  await writeFile(path, far)
  expect(await counted()).toStrictEqual({ one: 1 })
})

test('the lowest bits of an entry that has a cluster are no part of its place', async () => {
  await write({ bitmaps: [{ name: 'flags', table: [cluster(3)] }] })
  const bytes = await readFile(path)
  const at = bytes.indexOf(pointerTo(bytes, cluster(3)))
  bytes.writeBigUInt64BE(bytes.readBigUInt64BE(at) | 1n | (1n << 63n), at)
  await writeFile(path, bytes)
  expect(await counted()).toStrictEqual({ flags: 2 })
})

/** The entry of a table that has the place of this cluster. */
function pointerTo(image: Buffer, bytes: Buffer): Buffer {
  const pointer = Buffer.alloc(8)
  pointer.writeBigUInt64BE(BigInt(image.indexOf(bytes)))
  return pointer
}

/** Where the entry of a bitmap without extra data begins in the directory. */
function entryOf(image: Buffer, name: string): number {
  return image.indexOf(name) - 24
}
