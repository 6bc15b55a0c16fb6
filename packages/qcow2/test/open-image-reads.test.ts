import { setImmediate as turn } from 'node:timers/promises'
import fc from 'fast-check'
import { expect, test } from 'vitest'
import {
  ExtentKind,
  ExtentList,
  type ImageFile,
  type ImageOptions,
  openImage,
  planImage,
} from '../src/index.ts'
import {
  BACKING,
  compose,
  extentsAsArray,
  extentsOf,
  layerPlans,
  listOf,
  memoryFile,
  nextDisk,
} from './chain-model.ts'
import { ControlledGuest } from './controlled-guest.ts'

const { unallocated, zero, data } = ExtentKind
const MIB = 2 ** 20

/** The file of an image whose data nobody reads; notes what is read of it. */
function metadataFile(
  extents: ExtentList,
  options: ImageOptions,
): { file: ImageFile; reads: [number, number][] } {
  const layout = planImage(extents, options)
  const reads: [number, number][] = []
  const file: ImageFile = {
    size: layout.fileSize,
    async read(offset, into) {
      reads.push([offset, into.length])
      const metadata = into.subarray(0, Math.max(0, layout.dataStart - offset))
      layout.readMetadata(offset, metadata)
    },
  }
  return { file, reads }
}

test('what was planned is what is read', async () => {
  await fc.assert(
    fc.asyncProperty(layerPlans(16, MIB), fc.boolean(), async (plan, hasParent) => {
      const { file, layout } = await compose(plan, nextDisk(undefined, plan), hasParent ? BACKING : undefined)
      const image = await openImage(memoryFile(file))
      const wanted = new ExtentList()
      const extents = extentsOf(plan)
      for (let i = 0; i < extents.count; i++) {
        const kind = extents.kind(i)
        wanted.append(extents.length(i), kind === zero && !hasParent ? unallocated : kind)
      }
      const last = Math.max(0, wanted.count - 1)
      const rounded = layout.virtualSize - wanted.size
      if (rounded > 0) wanted.append(rounded, wanted.kind(last))
      expect(extentsAsArray(image.extents)).toEqual(extentsAsArray(wanted))
      for (let i = 0; i < image.extents.count; i++)
        expect(image.extents.fileOffset(i)).toBe(layout.fileOffset(image.extents.start(i)) ?? -1)
    }),
    { numRuns: 200 },
  )
})

test('tables that lie side by side are read in windows of 4 MiB', async () => {
  // 65 L2 tables of 64 KiB, with data and holes by turns in each
  const extents = new ExtentList()
  while (extents.size < 65 * 512 * MIB) {
    extents.append(100 * MIB, data)
    extents.append(28 * MIB, unallocated)
  }
  const { file, reads } = metadataFile(extents, {})
  const image = await openImage(file)
  expect(extentsAsArray(image.extents)).toEqual(extentsAsArray(extents))
  const l1 = reads[2]?.[0] ?? 0
  expect(reads).toEqual([
    [0, 4096],
    [65536, 65536],
    [l1, 65 * 8],
    [l1 + 65536, 4 * MIB],
    [l1 + 65536 + 4 * MIB, 65536],
  ])
})

test('a large L1 table is read in windows of 4 MiB too, and only the L2 tables that exist', async () => {
  const extents = new ExtentList()
  extents.append(4096, data)
  extents.append(2.5 * MIB * MIB - 8192, unallocated)
  extents.append(4096, zero)
  const { file, reads } = metadataFile(extents, { clusterSize: 4096, backing: BACKING })
  const image = await openImage(file)
  expect(extentsAsArray(image.extents)).toEqual(extentsAsArray(extents))
  const l1 = reads[2]?.[0] ?? 0
  expect(reads).toEqual([
    [0, 4096],
    [4096, 4096],
    [l1, 4 * MIB],
    [l1 + 4 * MIB, 4 * MIB],
    [l1 + 8 * MIB, 2 * MIB],
    [l1 + 10 * MIB, 8192],
  ])
})

/** An image with 24 L2 tables of 2 MiB, each with explicit zeros first and then nothing. */
function manyTables(): Buffer {
  const extents = new ExtentList()
  for (let i = 0; i < 24; i++) {
    extents.append(TABLE, zero)
    extents.append(TABLE * (TABLE / 8) - TABLE, unallocated)
  }
  const layout = planImage(extents, { clusterSize: TABLE, backing: BACKING })
  const file = Buffer.alloc(layout.fileSize)
  layout.readMetadata(0, file)
  return file
}

const TABLE = 2 * MIB

/** A file whose reads the test settles. */
function slowFile(bytes: Buffer): { guest: ControlledGuest; file: ImageFile } {
  const guest = new ControlledGuest(bytes)
  return { guest, file: { size: bytes.length, read: guest.read.bind(guest) } }
}

test.each([
  { size: 0, windows: [] },
  { size: MIB * MIB, windows: [4 * MIB] },
  { size: MIB * MIB + 2 * MIB, windows: [4 * MIB, 8] },
])('the L1 table of $size bytes without data is read in windows of $windows', async ({ size, windows }) => {
  const { file, reads } = metadataFile(listOf([size, unallocated]), { clusterSize: 4096 })
  expect((await openImage(file)).virtualSize).toBe(size)
  expect(reads.slice(2).map(([, length]) => length)).toEqual(windows)
})

test('of the windows four are read at a time, and visited in order', async () => {
  const { guest, file } = slowFile(manyTables())
  const opened = openImage(file)
  for (const index of [0, 1, 2]) {
    guest.at(index).complete() // the header, the refcount table, the L1 table
    await turn()
  }
  expect(guest.reads.length).toBe(3 + 4)
  for (const index of [4, 5, 6]) guest.at(index).complete()
  await turn()
  expect(guest.reads.length).toBe(3 + 4)
  guest.at(3).complete()
  await turn()
  expect(guest.reads.length).toBe(3 + 8)
  for (let i = 7; i < guest.reads.length; i++) {
    guest.at(i).complete()
    await turn()
  }
  expect(guest.reads.length).toBe(3 + 12)
  const first = 4 * TABLE // after the header, the refcount table and block, and the L1 table
  expect(guest.reads.slice(3).map(read => [read.offset, read.into.length])).toEqual(
    Array.from({ length: 12 }, (_, i) => [first + i * 4 * MIB, 4 * MIB]),
  )
  const covers = TABLE * (TABLE / 8)
  expect(extentsAsArray((await opened).extents)).toEqual(
    Array.from({ length: 24 }, (_, i) => [
      { start: i * covers, length: TABLE, kind: zero },
      { start: i * covers + TABLE, length: covers - TABLE, kind: unallocated },
    ]).flat(),
  )
})

test('the error of a read is thrown as it is, once no other read is under way', async () => {
  const { guest, file } = slowFile(manyTables())
  const failure = new Error('the storage is gone')
  let over = false
  const opened = openImage(file).finally(() => {
    over = true
  })
  const outcome = expect(opened).rejects.toBe(failure)
  for (const index of [0, 1, 2]) {
    guest.at(index).complete()
    await turn()
  }
  guest.at(4).fail(new Error('a later one, seen first'))
  await turn()
  guest.at(3).fail(failure)
  await turn()
  expect([over, guest.reads.length]).toEqual([false, 7])
  guest.at(5).complete()
  guest.at(6).fail(new Error('another'))
  await outcome
})

test('the signal is handed to every read', async () => {
  const { guest, file } = slowFile(manyTables())
  const abort = new AbortController()
  const opened = openImage(file, { signal: abort.signal })
  const outcome = expect(opened).rejects.toThrow('given up')
  for (const index of [0, 1, 2]) {
    guest.at(index).complete()
    await turn()
  }
  expect(guest.reads.every(read => read.signal === abort.signal)).toBe(true)
  for (const read of guest.reads.slice(3)) read.fail(new Error('given up'))
  await outcome
})

test('without a signal reads get none', async () => {
  const { guest, file } = slowFile(manyTables())
  const opened = expect(openImage(file)).rejects.toThrow('no more')
  guest.at(0).complete()
  await turn()
  expect(guest.reads.map(read => read.signal)).toEqual([undefined, undefined])
  guest.at(1).fail(new Error('no more'))
  await opened
})
