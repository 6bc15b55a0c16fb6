import { describe, expect, test } from 'vitest'
import { openImage, planImage, type Qcow2Image } from '../src/index.ts'
import { BACKING, compose, type LayerPlan, listOf, memoryFile, nextDisk } from './chain-model.ts'

const CLUSTER = 4096
const MIB = 2 ** 20
const PLAN: LayerPlan = { clusterSize: CLUSTER, size: 3 * MIB, runs: [[2, 3]], seed: 1 }
const DISK = nextDisk(undefined, PLAN)
const { file: IMAGE } = await compose(PLAN, DISK, BACKING)
const { file: FULL } = await compose(PLAN, DISK)

// Varve's header: 112 bytes, the backing format at 112, the end of extensions at 128, the name at 136
const FORMAT = 112
const END = 128
const NAME = 136

const entry = (at: number, value: bigint) => (file: Buffer) => void file.writeBigUInt64BE(value, at)
const field = (at: number, value: number) => (file: Buffer) => void file.writeUInt32BE(value, at)

/** Opens a copy of an image with a change. */
async function openChanged(change: (file: Buffer) => void, image: Buffer = IMAGE): Promise<Qcow2Image> {
  const file = Buffer.from(image)
  change(file)
  return openImage(memoryFile(file))
}

const unsupported = (message: RegExp) =>
  expect.objectContaining({ code: 'QCOW2_UNSUPPORTED', message: expect.stringMatching(message) })
const invalid = (message: RegExp) =>
  expect.objectContaining({ code: 'QCOW2_INVALID', message: expect.stringMatching(message) })

/** Puts a header extension of zeros before the others. */
function insertExtension(file: Buffer, type: number, length: number): void {
  const size = 8 + Math.ceil(length / 8) * 8
  file.copyWithin(FORMAT + size, FORMAT, CLUSTER - size)
  file.fill(0, FORMAT, FORMAT + size)
  field(FORMAT, type)(file)
  field(FORMAT + 4, length)(file)
  entry(8, BigInt(NAME + size))(file)
}

describe('is read although Varve does not write it', () => {
  test.each([
    { name: 'a compatible feature', change: entry(80, 1n) },
    { name: 'an autoclear feature', change: entry(88, 2n) },
    {
      name: 'a header of 104 bytes',
      change: (file: Buffer) => {
        field(100, 104)(file)
        file.copyWithin(104, 112, CLUSTER)
        file.writeBigUInt64BE(file.readBigUInt64BE(8) - 8n, 8)
      },
    },
    { name: 'an unknown header extension', change: field(END, 0x12345678) },
    {
      name: 'an empty L2 table in the middle',
      change: (file: Buffer) => file.fill(0, 4 * CLUSTER, 5 * CLUSTER),
    },
  ])('$name', async ({ change }) => {
    const image = await openChanged(change)
    expect([image.virtualSize, image.backing?.format]).toEqual([DISK.length, 'qcow2'])
  })
})

describe('incompatible features are refused by name', () => {
  test.each([
    [1n, /not closed properly \(dirty\)/],
    [2n, /marked as corrupt/],
    [4n, /in an external file/],
    [8n, /compression type/],
    [16n, /extended L2/],
    [32n, /not known/],
    [1n << 32n, /not known/],
    [1n << 63n, /not known/],
  ])('%i', async (bits, message) => {
    await expect(openChanged(entry(72, bits))).rejects.toEqual(unsupported(message))
  })
})

describe('header extensions', () => {
  test.each([0, 1, 7, 8, 9, 16, 17, 600])('an unknown one of %i bytes is passed over', async length => {
    const image = await openChanged(file => insertExtension(file, 0x12345678, length))
    expect(image.backing).toEqual(BACKING)
  })

  test('one that ends where the name begins is seen', async () => {
    await expect(openChanged(field(END, 0x23852875))).rejects.toEqual(unsupported(/bitmaps/))
    await expect(openChanged(field(END + 4, 1))).resolves.toHaveProperty('backing')
  })

  test('one that goes on into the name is invalid', async () => {
    const unknown = (length: number) => (file: Buffer) => {
      field(FORMAT, 0x12345678)(file)
      field(FORMAT + 4, length)(file)
    }
    await expect(openChanged(unknown(16))).rejects.toEqual(unsupported(/does not say what format/))
    await expect(openChanged(unknown(17))).rejects.toEqual(invalid(/extension of 17 bytes/))
  })

  test('what follows their end is none', async () => {
    const image = await openChanged(field(FORMAT + 8, 0x23852875), FULL)
    expect(image.virtualSize).toBe(DISK.length)
  })

  test('without a backing file they go on to the end of what is read', async () => {
    const fill = (length: number) => (file: Buffer) => {
      field(FORMAT, 0x12345678)(file)
      field(FORMAT + 4, length)(file)
    }
    await expect(openChanged(fill(CLUSTER - FORMAT - 8), FULL)).resolves.toHaveProperty('virtualSize')
    await expect(openChanged(fill(CLUSTER - FORMAT - 7), FULL)).rejects.toEqual(
      invalid(/extension of 3977 bytes/),
    )
  })
})

describe('the backing file name', () => {
  test.each([
    { name: 'a', what: 'one byte' },
    { name: 'n'.repeat(1023), what: '1023 bytes' },
    { name: '\ufeff../0/vda.qcow2', what: 'a byte order mark' },
    { name: '../ä/磁盘 1.raw', what: 'letters of all kinds' },
  ])('of $what is read as it was written', async ({ name }) => {
    const backing = { name, format: 'raw' } as const
    const { file } = await compose(PLAN, DISK, backing)
    expect((await openImage(memoryFile(file))).backing).toEqual(backing)
  })

  test('may end where the first 4096 bytes do, and no later', async () => {
    const move = (offset: number) => (file: Buffer) => {
      file.copyWithin(offset, NAME, NAME + BACKING.name.length)
      entry(8, BigInt(offset))(file)
    }
    const image = await openChanged(move(CLUSTER - BACKING.name.length))
    expect(image.backing).toEqual(BACKING)
    await expect(openChanged(entry(8, BigInt(CLUSTER - BACKING.name.length + 1)))).rejects.toEqual(
      invalid(/too far behind/),
    )
  })

  test('may follow the header at once, but then there is no format', async () => {
    await expect(openChanged(entry(8, 112n))).rejects.toEqual(unsupported(/does not say what format/))
    await expect(openChanged(entry(8, 111n))).rejects.toEqual(invalid(/in the header/))
  })
})

describe('the tables', () => {
  /** A sparse full image of 64 KiB clusters with a refcount table of so many, and the L1 table right after it. */
  function withRefcountTable(clusters: number): Promise<Qcow2Image> {
    const file = Buffer.alloc((clusters + 3) * 65536)
    planImage(listOf([MIB, 0])).readMetadata(0, file.subarray(0, 65536))
    field(56, clusters)(file)
    entry(40, BigInt((1 + clusters) * 65536))(file)
    return openImage(memoryFile(file))
  }

  test('a refcount table has at most 8 MiB, and the L1 table may follow it at once', async () => {
    expect((await withRefcountTable(128)).virtualSize).toBe(MIB)
    await expect(withRefcountTable(129)).rejects.toEqual(invalid(/refcount table of 129 clusters/))
  })

  test('an L1 table of several clusters is in use to its end', async () => {
    const l1 = 3 * CLUSTER
    const plan: LayerPlan = { clusterSize: CLUSTER, size: 1024 * 2 * MIB, runs: [], seed: 1 }
    const layout = planImage(listOf([plan.size, 0]), { clusterSize: CLUSTER })
    const file = Buffer.alloc(layout.fileSize + CLUSTER)
    layout.readMetadata(0, file.subarray(0, layout.dataStart))
    const pointAt = (offset: number) => openChanged(entry(l1, (1n << 63n) | BigInt(offset)), file)
    await expect(pointAt(l1)).rejects.toEqual(unsupported(/ascending order/))
    await expect(pointAt(l1 + CLUSTER)).rejects.toEqual(invalid(/in use/))
    expect((await pointAt(l1 + 2 * CLUSTER)).extents.count).toBe(1)
  })
})
