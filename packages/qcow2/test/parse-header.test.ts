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

describe('is refused, as Varve does not write it', () => {
  test.each([
    { name: 'a compatible feature', change: entry(80, 1n) },
    { name: 'an autoclear feature', change: entry(88, 2n) },
    { name: 'snapshots that are none, somewhere', change: entry(64, 4096n) },
    {
      name: 'a header of 104 bytes',
      change: (file: Buffer) => {
        field(100, 104)(file)
        file.copyWithin(104, 112, CLUSTER)
        file.writeBigUInt64BE(file.readBigUInt64BE(8) - 8n, 8)
      },
    },
    { name: 'something in the padding of the header', change: field(108, 1) },
    { name: 'something in the padding of an extension', change: field(FORMAT + 12, 0x32000001) },
    { name: 'an end of extensions that has a length', change: field(END + 4, 1) },
    {
      name: 'the backing file name elsewhere',
      change: (file: Buffer) => {
        file.copyWithin(NAME + 8, NAME, NAME + BACKING.name.length)
        entry(8, BigInt(NAME + 8))(file)
      },
    },
  ])('$name', async ({ change }) => {
    await expect(openChanged(change)).rejects.toEqual(unsupported(/in it that Varve does not write/))
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
  test('an unknown one is refused, with its type', async () => {
    await expect(openChanged(field(END, 0x6803f857))).rejects.toEqual(unsupported(/of the type 0x6803f857/))
    await expect(openChanged(field(FORMAT, 0x12345678), FULL)).rejects.toEqual(
      unsupported(/of the type 0x12345678/),
    )
  })

  test('one that ends where the name begins is seen', async () => {
    await expect(openChanged(field(END, 0x23852875))).rejects.toEqual(unsupported(/bitmaps/))
  })

  test('one that goes on into the name, or behind what is read, is invalid', async () => {
    const unknown = (length: number) => (file: Buffer) => {
      field(FORMAT, 0x12345678)(file)
      field(FORMAT + 4, length)(file)
    }
    await expect(openChanged(unknown(16))).rejects.toEqual(unsupported(/of the type/))
    await expect(openChanged(unknown(17))).rejects.toEqual(invalid(/extension of 17 bytes/))
    const most = CLUSTER - FORMAT - 8
    await expect(openChanged(unknown(most), FULL)).rejects.toEqual(unsupported(/of the type/))
    await expect(openChanged(unknown(most + 1), FULL)).rejects.toEqual(invalid(/extension of 3977 bytes/))
  })

  test('what follows their end is none', async () => {
    const image = await openChanged(field(FORMAT + 8, 0x23852875), FULL)
    expect(image.virtualSize).toBe(DISK.length)
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

  test('does not end after the first 4096 bytes', async () => {
    const most = CLUSTER - BACKING.name.length
    await expect(openChanged(entry(8, BigInt(most + 1)))).rejects.toEqual(invalid(/too far behind/))
    const moved = (file: Buffer) => {
      file.copyWithin(most, NAME, NAME + BACKING.name.length)
      entry(8, BigInt(most))(file)
    }
    await expect(openChanged(moved)).rejects.toEqual(unsupported(/does not write/))
  })

  test('may follow the header at once, but then there is no format', async () => {
    await expect(openChanged(entry(8, 112n))).rejects.toEqual(unsupported(/does not say what format/))
    await expect(openChanged(entry(8, 111n))).rejects.toEqual(invalid(/in the header/))
  })
})

describe('the tables', () => {
  /** A sparse full image of 64 KiB clusters with a refcount table of so many, and the L1 table right after it. */
  function withRefcountTable(clusters: number): Promise<Qcow2Image> {
    const file = Buffer.alloc((clusters + 2) * 65536)
    planImage(listOf([MIB, 0])).readMetadata(0, file.subarray(0, 65536))
    field(56, clusters)(file)
    entry(40, BigInt((1 + clusters) * 65536))(file)
    return openImage(memoryFile(file))
  }

  test('a refcount table has at most 8 MiB, and the L1 table may follow it at once', async () => {
    expect((await withRefcountTable(128)).virtualSize).toBe(MIB)
    await expect(withRefcountTable(129)).rejects.toEqual(invalid(/refcount table of 129 clusters/))
  })

  /** An image of three L2 tables, whose refcount table has two blocks. */
  async function withTwoBlocks(): Promise<Buffer> {
    const plan: LayerPlan = { clusterSize: CLUSTER, size: 5 * 2 ** 20, runs: [[2, 1280]], seed: 1 }
    const small = await compose(plan, nextDisk(undefined, plan))
    // 2048 clusters have refcounts in one block: another plan of the same file begins a cluster later.
    expect(small.file.readBigUInt64BE(CLUSTER)).toBe(BigInt(2 * CLUSTER))
    const file = Buffer.concat([
      small.file.subarray(0, 3 * CLUSTER),
      Buffer.alloc(CLUSTER),
      small.file.subarray(3 * CLUSTER),
    ])
    entry(CLUSTER + 8, BigInt(3 * CLUSTER))(file)
    entry(40, BigInt(4 * CLUSTER))(file)
    for (const at of [0, 8, 16]) {
      const table = 4 * CLUSTER + at
      entry(table, file.readBigUInt64BE(table) + BigInt(CLUSTER))(file)
    }
    for (let at = 5 * CLUSTER; at < 5 * CLUSTER + 1280 * 8; at += 8)
      entry(at, file.readBigUInt64BE(at) + BigInt(CLUSTER))(file)
    return file
  }

  const BLOCKS = 2 * CLUSTER

  test.each([
    ['two that are in their places', () => undefined, undefined],
    [
      'one in the refcount table',
      entry(CLUSTER, BigInt(CLUSTER)),
      invalid(/Refcount table entry 0 .* in use/),
    ],
    [
      'one in the header',
      entry(CLUSTER + 8, 0n),
      unsupported(/end at 12288 and the L1 table begins at 16384/),
    ],
    ['two in one place', entry(CLUSTER + 8, BigInt(BLOCKS)), invalid(/entry 1 .* in use/)],
    [
      'two that descend',
      (file: Buffer) => {
        entry(CLUSTER, BigInt(BLOCKS + CLUSTER))(file)
        entry(CLUSTER + 8, BigInt(BLOCKS))(file)
      },
      unsupported(/entry 0 .* no gap/),
    ],
    ['one inside a cluster', entry(CLUSTER + 8, BigInt(BLOCKS + CLUSTER + 512)), invalid(/inside a cluster/)],
    [
      'one with reserved bits',
      entry(CLUSTER + 8, BigInt(BLOCKS + CLUSTER + 1)),
      invalid(/^Refcount table entry 1 has reserved bits/),
    ],
    ['one after the end of the file', entry(CLUSTER + 8, 1n << 40n), invalid(/file of .* ends before/)],
    ['one at 2^63', entry(CLUSTER, 1n << 63n), invalid(/file of .* ends before/)],
    [
      'a third one, in the L1 table',
      entry(CLUSTER + 16, BigInt(4 * CLUSTER)),
      invalid(/^Refcount table entry 2 .* after the L1 table begins/),
    ],
    [
      'one after an empty entry',
      (file: Buffer) => {
        entry(CLUSTER + 8, 0n)(file)
        entry(2 * CLUSTER - 8, BigInt(BLOCKS + CLUSTER))(file)
      },
      unsupported(/^Refcount table entry 511 comes after an empty one/),
    ],
    ['none', (file: Buffer) => file.fill(0, CLUSTER, CLUSTER + 16), unsupported(/end at 8192/)],
  ] as const)('refcount blocks: %s', async (_what, change, refusal) => {
    const opened = openChanged(change, await withTwoBlocks())
    if (refusal) await expect(opened).rejects.toEqual(refusal)
    else expect((await opened).extents.count).toBe(1)
  })

  test('the refcount table is right after the header', async () => {
    const moved = Buffer.concat([IMAGE.subarray(0, CLUSTER), Buffer.alloc(CLUSTER), IMAGE.subarray(CLUSTER)])
    await expect(openChanged(entry(48, BigInt(2 * CLUSTER)), moved)).rejects.toEqual(
      unsupported(/right after the header/),
    )
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
