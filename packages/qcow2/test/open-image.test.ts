import { expect, test } from 'vitest'
import { ExtentKind, openImage, type Qcow2Image } from '../src/index.ts'
import { BACKING, compose, extentsAsArray, type LayerPlan, memoryFile, nextDisk } from './chain-model.ts'

const { unallocated, zero, data } = ExtentKind
const CLUSTER = 4096
const PER_TABLE = 512

/** Five L1 entries; tables for the first and the third: data, zeros and holes in both. */
const PLAN: LayerPlan = {
  clusterSize: CLUSTER,
  size: 9 * 2 ** 20 + 512,
  runs: [
    [data, 3],
    [zero, 2],
    [unallocated, 1],
    [data, 1],
    [unallocated, 2 * PER_TABLE - 7 + 10],
    [data, 2],
    [zero, 1],
  ],
  seed: 1,
}
const DISK = nextDisk(undefined, PLAN)
const { file: IMAGE, layout: LAYOUT } = await compose(PLAN, DISK, BACKING)
const { file: FULL } = await compose(PLAN, DISK)

// where the tables of IMAGE are, in clusters: header, refcount table, refcount block, L1, two L2, data
const L1 = 3 * CLUSTER
const L2 = 4 * CLUSTER
const DATA = 6 * CLUSTER
const COPIED = 1n << 63n

/** A copy of an image with a change. */
function changed(change: (file: Buffer) => void, image: Buffer = IMAGE): Buffer {
  const file = Buffer.from(image)
  change(file)
  return file
}

function openBytes(file: Uint8Array): Promise<Qcow2Image> {
  return openImage(memoryFile(file))
}

const entry = (at: number, value: bigint) => (file: Buffer) => void file.writeBigUInt64BE(value, at)
const field = (at: number, value: number) => (file: Buffer) => void file.writeUInt32BE(value, at)

test('the places of the tables are what these tests take them for', () => {
  expect(IMAGE.readBigUInt64BE(40)).toBe(BigInt(L1))
  expect(IMAGE.readBigUInt64BE(L1)).toBe(COPIED | BigInt(L2))
  expect(IMAGE.readBigUInt64BE(L1 + 16)).toBe(COPIED | BigInt(L2 + CLUSTER))
  expect(LAYOUT.dataStart).toBe(DATA)
})

test('an image is read with its sizes, its backing file and what it holds', async () => {
  const image = await openBytes(IMAGE)
  expect([image.virtualSize, image.clusterSize, image.backing]).toEqual([DISK.length, CLUSTER, BACKING])
  const at = (cluster: number): number => cluster * CLUSTER
  const second = 2 * PER_TABLE + 10
  expect(extentsAsArray(image.extents)).toEqual([
    { start: 0, length: at(3), kind: data },
    { start: at(3), length: at(2), kind: zero },
    { start: at(5), length: at(1), kind: unallocated },
    { start: at(6), length: at(1), kind: data },
    { start: at(7), length: at(second - 7), kind: unallocated },
    { start: at(second), length: at(2), kind: data },
    { start: at(second + 2), length: at(1), kind: zero },
    { start: at(second + 3), length: DISK.length - at(second + 3), kind: unallocated },
  ])
  const offsets = Array.from({ length: image.extents.count }, (_, i) => image.extents.fileOffset(i))
  expect(offsets).toEqual([DATA, -1, -1, DATA + at(3), -1, DATA + at(4), -1, -1])
})

test('a full image has no backing file', async () => {
  expect(await openBytes(FULL)).not.toHaveProperty('backing')
})

test.each([-1, 8, 0.5])('there is no run %d in an image of eight', async index => {
  const { extents } = await openBytes(IMAGE)
  for (const read of [
    () => extents.start(index),
    () => extents.length(index),
    () => extents.kind(index),
    () => extents.fileOffset(index),
  ])
    expect(read).toThrow(
      expect.objectContaining({
        code: 'QCOW2_ARGUMENT',
        message: `There is no extent ${index} in an image of 8.`,
        context: { index },
      }),
    )
})

test('an image of no disk is read', async () => {
  const { file } = await compose({ clusterSize: 65536, size: 0, runs: [], seed: 0 }, Buffer.alloc(0))
  const image = await openBytes(file)
  expect([image.virtualSize, image.extents.count]).toEqual([0, 0])
})

test('runs go on from one L2 table into the next', async () => {
  const plan: LayerPlan = {
    clusterSize: CLUSTER,
    size: 8 * 2 ** 20,
    runs: [
      [data, PER_TABLE + 1],
      [zero, 2 * PER_TABLE],
      [unallocated, 1],
    ],
    seed: 1,
  }
  const { file, layout } = await compose(plan, nextDisk(undefined, plan), BACKING)
  const { extents } = await openBytes(file)
  expect(extentsAsArray(extents).map(run => [run.length / CLUSTER, run.kind])).toEqual([
    [PER_TABLE + 1, data],
    [2 * PER_TABLE, zero],
    [PER_TABLE - 1, unallocated],
  ])
  expect(extents.fileOffset(0)).toBe(layout.dataStart)
})

const UNSUPPORTED: Record<string, (file: Buffer) => void> = {
  'version 2': field(4, 2),
  'version 4': field(4, 4),
  'clusters of 2 KiB': field(20, 11),
  'clusters of 4 MiB': field(20, 22),
  'an absurd number of cluster bits': field(20, 0xffffffff),
  'a size that is no whole number of sectors': entry(24, BigInt(DISK.length - 1)),
  encryption: field(32, 1),
  'more L1 entries than needed': field(36, 6),
  'internal snapshots': field(60, 1),
  'refcounts of 8 bits': field(96, 3),
  'refcounts of 32 bits': field(96, 5),
  'a long header': field(100, 4096 + 8),
  'a compression type in the header': file => void file.writeUInt8(1, 104),
  bitmaps: field(112, 0x23852875),
  'a data file extension': field(112, 0x44415441),
  'an encryption extension': field(112, 0x0537be77),
  'a backing file of unknown format': field(112, 0x12345678),
  'a backing file of another format': file => void file.write('vmdk2', 120),
  'the L1 table before the refcount table': file => {
    entry(48, BigInt(L1))(file)
    entry(40, BigInt(CLUSTER))(file)
  },
  'a shared L2 table': entry(L1, BigInt(L2)),
  'L2 tables that descend': file => {
    entry(L1, COPIED | BigInt(L2 + CLUSTER))(file)
    entry(L1 + 8, COPIED | BigInt(L2 + 2 * CLUSTER))(file)
    entry(L1 + 16, COPIED | BigInt(L2))(file)
  },
  'a shared data cluster': entry(L2, BigInt(DATA)),
  'a compressed cluster': entry(L2, (1n << 62n) | BigInt(DATA)),
  'a zero cluster with space in the file': entry(L2, COPIED | BigInt(DATA) | 1n),
  'a zero cluster that is marked as used': entry(L2, COPIED | 1n),
  'data before the tables': entry(L2, COPIED | BigInt(CLUSTER)),
  'data that descends': entry(L2 + 16, COPIED | BigInt(DATA)),
  'data at its neighbour in another table': entry(L2 + CLUSTER + 80, COPIED | BigInt(DATA + CLUSTER)),
  'a gap before the L2 tables': entry(L1, COPIED | BigInt(L2 + CLUSTER)),
  'a gap between the L2 tables': entry(L1 + 16, COPIED | BigInt(L2 + 2 * CLUSTER)),
  'a gap before the data': entry(L2, COPIED | BigInt(DATA + CLUSTER)),
  'a gap between data': entry(L2 + 8, COPIED | BigInt(DATA + 2 * CLUSTER)),
  'data that no table tells of': entry(L2 + CLUSTER + 88, 0n),
  'an L2 table that no entry tells of': entry(L1 + 16, 0n),
}

const INVALID: Record<string, (file: Buffer) => void> = {
  'another magic': field(0, 0x514649fa),
  'a size over 2^53': entry(24, 1n << 53n),
  'too few L1 entries': field(36, 4),
  'an L1 table over 32 MiB': field(36, 4 * 2 ** 20 + 1),
  'an L1 table inside a cluster': entry(40, BigInt(L1 + 512)),
  'an L1 table in the header': entry(40, 0n),
  'an L1 table after the end of the file': entry(40, BigInt(IMAGE.length)),
  'an L1 table at 2^64 - 1': entry(40, (1n << 64n) - 1n),
  'an L1 table in the refcount table': entry(40, BigInt(CLUSTER)),
  'no refcount table': field(56, 0),
  'a refcount table over 8 MiB': field(56, 2049),
  'a refcount table over the end of the file': field(56, IMAGE.length / CLUSTER),
  'a refcount table in the header': entry(48, 0n),
  'a refcount table inside a cluster': entry(48, BigInt(CLUSTER + 8)),
  'a refcount table over the L1 table': field(56, 3),
  'a short header': field(100, 96),
  'a header that is no multiple of eight': field(100, 116),
  'a header larger than the file': field(100, IMAGE.length + 8),
  'a backing name in the header': entry(8, 104n),
  'a backing name after the header': entry(8, 4095n),
  'a backing name at 2^63': entry(8, 1n << 63n),
  'a backing name without a length': field(16, 0),
  'a backing name of 1024 bytes': field(16, 1024),
  'a length of a backing name that is nowhere': file => {
    entry(8, 0n)(file)
    field(112, 0)(file)
  },
  'a backing format without a backing file': file => {
    entry(8, 0n)(file)
    field(16, 0)(file)
  },
  'a backing name with a zero byte': file => void file.writeUInt8(0, 140),
  'a backing name that is not UTF-8': file => void file.writeUInt8(0xff, 140),
  'a backing format that is not UTF-8': file => void file.writeUInt8(0xff, 120),
  'an extension that is longer than the header': field(116, 17),
  'an extension of 4 GiB': field(116, 0xffffffff),
  'an L1 entry with bit 62': entry(L1, COPIED | (1n << 62n) | BigInt(L2)),
  'an L1 entry with bit 56': entry(L1, COPIED | (1n << 56n) | BigInt(L2)),
  'an L1 entry with bit 0': entry(L1, COPIED | BigInt(L2) | 1n),
  'an L1 entry with bit 8': entry(L1, COPIED | BigInt(L2) | 256n),
  'an L2 table inside a cluster': entry(L1, COPIED | BigInt(L2 + 512)),
  'an L2 table after the end of the file': entry(L1 + 16, COPIED | BigInt(IMAGE.length)),
  'an L2 table at 2^55': entry(L1, COPIED | (1n << 55n)),
  'an L2 table at 0': entry(L1, COPIED),
  'an L2 table in use for another entry': entry(L1 + 16, COPIED | BigInt(L2)),
  'an L2 table in the L1 table': entry(L1, COPIED | BigInt(L1)),
  'an L2 entry with bit 61': entry(L2, COPIED | (1n << 61n) | BigInt(DATA)),
  'an L2 entry with bit 1': entry(L2, COPIED | BigInt(DATA) | 2n),
  'an L2 entry of bit 1 alone': entry(L2, 2n),
  'data inside a cluster': entry(L2, COPIED | BigInt(DATA + 512)),
  'data after the end of the file': entry(L2 + CLUSTER + 88, COPIED | BigInt(IMAGE.length)),
  'data at 2^55': entry(L2, COPIED | (1n << 55n)),
  'data in use for the cluster before': entry(L2 + 8, COPIED | BigInt(DATA)),
  'data in the last L2 table': entry(L2, COPIED | BigInt(L2 + CLUSTER)),
}

/** A whole sentence: no part of it is empty. */
const sentence = expect.stringMatching(/^(?!.* {2})[A-Z].*[^ ]\.$/)

test.each(Object.entries(UNSUPPORTED))('%s is not supported', async (_name, change) => {
  await expect(openBytes(changed(change))).rejects.toMatchObject({
    name: 'Qcow2Error',
    code: 'QCOW2_UNSUPPORTED',
    message: sentence,
  })
})

test.each(Object.entries(INVALID))('%s is invalid', async (_name, change) => {
  await expect(openBytes(changed(change))).rejects.toMatchObject({
    name: 'Qcow2Error',
    code: 'QCOW2_INVALID',
    message: sentence,
  })
})

// Of these the comparison with the header that Varve would write, or a later table, would refuse many all the same.
test.each<[string, RegExp]>([
  ['version 2', /^A qcow2 image of version 2;/],
  ['version 4', /^A qcow2 image of version 4;/],
  ['clusters of 2 KiB', /^Clusters of 2\^11 bytes;/],
  ['clusters of 4 MiB', /^Clusters of 2\^22 bytes;/],
  ['encryption', /^It is encrypted\.$/],
  ['internal snapshots', /^It holds internal snapshots\.$/],
  ['refcounts of 8 bits', /^Refcounts of 2\^3 bits;/],
  ['refcounts of 32 bits', /^Refcounts of 2\^5 bits;/],
  ['a data file extension', /external file\.$/],
  ['a backing file of another format', /of the format "vmdk2"\.$/],
  ['a shared L2 table', /^L1 entry 0 points at a cluster that is shared\.$/],
  ['a shared data cluster', /^L2 entry 0 points at a cluster that is shared\.$/],
  ['a zero cluster that is marked as used', /^L2 entry 0 is a zero cluster with space in the file\.$/],
  ['a size over 2^53', /^The size of the disk is over 2\^53\.$/],
  ['an L1 table at 2^64 - 1', /^The offset of the L1 table is over 2\^53\.$/],
  ['a short header', /^A header of 96 bytes\.$/],
  ['a header that is no multiple of eight', /^A header of 116 bytes\.$/],
  ['a backing name at 2^63', /^The offset of the backing file name is over 2\^53\.$/],
  ['a backing name without a length', /^A backing file name of 0 bytes\.$/],
  ['a backing name of 1024 bytes', /^A backing file name of 1024 bytes\.$/],
  ['a refcount table over the L1 table', /overlap\.$/],
])('%s is told as what it is', async (name, message) => {
  const change = UNSUPPORTED[name] ?? INVALID[name]
  await expect(openBytes(changed(change ?? (() => undefined)))).rejects.toMatchObject({
    message: expect.stringMatching(message),
  })
})

test('an entry that is not supported is named', async () => {
  await expect(openBytes(changed(entry(L2 + 8, BigInt(DATA + CLUSTER))))).rejects.toMatchObject({
    code: 'QCOW2_UNSUPPORTED',
    context: { table: 'L2', index: 1 },
  })
})

test('a file that is too short for any header is no image', async () => {
  const message = (length: number) =>
    expect.stringMatching(`^A file of ${length} bytes holds no qcow2 header\\.$`)
  for (const length of [0, 4, 103])
    await expect(openBytes(IMAGE.subarray(0, length))).rejects.toMatchObject({ message: message(length) })
  await expect(openBytes(IMAGE.subarray(0, 104))).rejects.not.toMatchObject({ message: message(104) })
})

test('a cluster after the end of the disk is invalid', async () => {
  const plan: LayerPlan = { clusterSize: CLUSTER, size: 5 * CLUSTER - 512, runs: [[data, 4]], seed: 1 }
  const { file } = await compose(plan, nextDisk(undefined, plan))
  const more = Buffer.concat([file, Buffer.alloc(CLUSTER)])
  const next = COPIED | BigInt(file.length)
  const inLast = await openBytes(changed(entry(L2 + 4 * 8, next), more))
  expect(inLast.extents.length(inLast.extents.count - 1)).toBe(5 * CLUSTER - 512)
  for (const value of [next, 1n])
    await expect(openBytes(changed(entry(L2 + 5 * 8, value), more))).rejects.toMatchObject({
      code: 'QCOW2_INVALID',
      message: 'L2 entry 5 is for a cluster after the end of the disk.',
    })
})

test('with one L2 table only, data in any table is refused all the same', async () => {
  const plan: LayerPlan = { clusterSize: CLUSTER, size: CLUSTER, runs: [[data, 1]], seed: 1 }
  const { file, layout } = await compose(plan, nextDisk(undefined, plan))
  expect(layout.dataStart).toBe(L2 + CLUSTER)
  for (let at = 0; at < layout.dataStart; at += CLUSTER)
    await expect(openBytes(changed(entry(L2, COPIED | BigInt(at)), file))).rejects.toMatchObject({
      code: at === 0 || at === L2 ? 'QCOW2_INVALID' : 'QCOW2_UNSUPPORTED',
    })
})

test('a file that goes on after its last cluster is refused', async () => {
  for (const image of [IMAGE, FULL])
    await expect(openBytes(Buffer.concat([image, Buffer.alloc(1)]))).rejects.toMatchObject({
      code: 'QCOW2_UNSUPPORTED',
      message: `The file of ${image.length + 1} bytes goes on after the last cluster, which ends at ${image.length}.`,
    })
})

test('an image of more runs than asked for is refused', async () => {
  expect((await openImage(memoryFile(IMAGE), { maxRuns: 8 })).extents.count).toBe(8)
  await expect(openImage(memoryFile(IMAGE), { maxRuns: 7 })).rejects.toMatchObject({
    name: 'Qcow2Error',
    code: 'QCOW2_UNSUPPORTED',
    message: sentence,
    context: { runs: 7 },
  })
})

test('a file that is cut short anywhere is invalid', async () => {
  for (const length of [
    0,
    1,
    103,
    104,
    111,
    112,
    4095,
    4096,
    CLUSTER * 2,
    L1,
    L1 + 39,
    L1 + 40,
    L2,
    L2 + 4095,
    DATA,
  ])
    await expect(openBytes(IMAGE.subarray(0, length)), `${length}`).rejects.toMatchObject({
      code: 'QCOW2_INVALID',
    })
  for (let length = DATA + CLUSTER; length < IMAGE.length; length += CLUSTER / 4)
    await expect(openBytes(IMAGE.subarray(0, length)), `${length}`).rejects.toMatchObject({
      code: 'QCOW2_INVALID',
    })
})

test.each([-1, 0.5, Number.NaN, 2 ** 53])('%d is not the size of a file', async size => {
  await expect(openImage({ size, read: async () => undefined })).rejects.toMatchObject({
    code: 'QCOW2_ARGUMENT',
    message: `Not the size of a file: ${size}.`,
    context: { size },
  })
})

test('an error names the entry and where it is', async () => {
  await expect(
    openBytes(changed(entry(L2 + CLUSTER + 88, COPIED | BigInt(DATA + 512)))),
  ).rejects.toMatchObject({
    message: `L2 entry ${2 * PER_TABLE + 11} points at ${DATA + 512}, inside a cluster.`,
    context: { table: 'L2', index: 2 * PER_TABLE + 11 },
  })
})
