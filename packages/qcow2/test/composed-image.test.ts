import { setImmediate as turn } from 'node:timers/promises'
import fc from 'fast-check'
import { expect, test } from 'vitest'
import { ComposedImage, ExtentKind, ExtentList, planImage } from '../src/index.ts'
import { compose, extentsOf, type LayerPlan, layerPlans, memoryGuest, nextDisk } from './chain-model.ts'
import { ControlledGuest } from './controlled-guest.ts'

const { unallocated, zero, data } = ExtentKind
const CLUSTER = 4096

/** Data clusters 0 and 1, 4, and 6 to the middle of 7, with a hole and zeros between. */
const PLAN: LayerPlan = {
  clusterSize: CLUSTER,
  size: 7 * CLUSTER + 1000,
  runs: [
    [data, 2],
    [unallocated, 2],
    [data, 1],
    [zero, 1],
    [data, 2],
  ],
  seed: 1,
}
const DISK = nextDisk(undefined, PLAN).subarray(0, PLAN.size)
const LAYOUT = planImage(extentsOf(PLAN), {
  clusterSize: CLUSTER,
  backing: { name: '../0/vda.qcow2', format: 'qcow2' },
})

test('any range of bytes is a slice of the whole', async () => {
  await fc.assert(
    fc.asyncProperty(layerPlans(14, 2 ** 20), fc.nat(), fc.nat(), async (plan, a, b) => {
      const disk = nextDisk(undefined, plan)
      const { layout, file } = await compose(plan, disk)
      const image = new ComposedImage(layout, memoryGuest(disk.subarray(0, plan.size)))
      expect(image.size).toBe(file.length)
      const start = a % (file.length + 1)
      const part = Buffer.alloc(b % (file.length - start + 1), 0xee)
      await image.read(start, part)
      expect(part.equals(file.subarray(start, start + part.length))).toBe(true)
    }),
    { numRuns: 300 },
  )
})

test('each contiguous run of the guest is one read, two at a time, straight into the memory of the caller', async () => {
  const guest = new ControlledGuest(DISK)
  const image = new ComposedImage(LAYOUT, guest)
  const into = Buffer.alloc(image.size, 0xee)
  const done = image.read(0, into)
  await turn()
  for (const index of [1, 0]) {
    expect(guest.reads.length).toBe(2)
    guest.at(index).complete()
    await turn()
  }
  guest.at(2).complete()
  await done
  expect(guest.reads.map(({ offset, into: part }) => [offset, part.length, part.byteOffset])).toEqual([
    [0, 2 * CLUSTER, into.byteOffset + LAYOUT.dataStart],
    [4 * CLUSTER, CLUSTER, into.byteOffset + LAYOUT.dataStart + 2 * CLUSTER],
    [6 * CLUSTER, CLUSTER + 1000, into.byteOffset + LAYOUT.dataStart + 3 * CLUSTER],
  ])
  expect(guest.reads.every(read => read.into.buffer === into.buffer)).toBe(true)
  expect(into.subarray(-(CLUSTER - 1000)).every(byte => byte === 0)).toBe(true)
})

test.each([
  { name: 'the middle of a run', start: 100, length: 50, reads: [[100, 50]] },
  {
    name: 'from the last byte of a run to the first of the next',
    start: 2 * CLUSTER - 1,
    length: 2,
    reads: [
      [2 * CLUSTER - 1, 1],
      [4 * CLUSTER, 1],
    ],
  },
  { name: 'the first byte of a run behind zeros', start: 3 * CLUSTER, length: 1, reads: [[6 * CLUSTER, 1]] },
  { name: 'the last byte of the disk', start: 4 * CLUSTER + 999, length: 1, reads: [[7 * CLUSTER + 999, 1]] },
  { name: 'the first byte after the disk', start: 4 * CLUSTER + 1000, length: 1, reads: [] },
  {
    name: 'the end of the disk and what comes after',
    start: 4 * CLUSTER + 990,
    length: 20,
    reads: [[7 * CLUSTER + 990, 10]],
  },
  { name: 'no bytes at the end of the file', start: 5 * CLUSTER, length: 0, reads: [] },
])('$name: the guest is asked for no byte more', async ({ start, length, reads }) => {
  const asked: number[][] = []
  const image = new ComposedImage(LAYOUT, {
    async read(offset, into) {
      asked.push([offset, into.length])
      into.set(DISK.subarray(offset, offset + into.length))
    },
  })
  const into = Buffer.alloc(length, 0xee)
  await image.read(LAYOUT.dataStart + start, into)
  expect(asked).toEqual(reads)
  const expected = Buffer.concat(reads.map(([offset = 0, size = 0]) => DISK.subarray(offset, offset + size)))
  expect(into.equals(Buffer.concat([expected, Buffer.alloc(length - expected.length)]))).toBe(true)
})

test('metadata alone asks the guest for nothing', async () => {
  const guest = new ControlledGuest(DISK)
  await new ComposedImage(LAYOUT, guest).read(0, Buffer.alloc(LAYOUT.dataStart))
  expect(guest.reads).toEqual([])
})

test('a failed read rejects with its error, and only when no other read still writes', async () => {
  const guest = new ControlledGuest(DISK)
  const failure = new Error('the disk is gone')
  let settled = false
  const done = new ComposedImage(LAYOUT, guest)
    .read(LAYOUT.dataStart, Buffer.alloc(LAYOUT.dataLength))
    .finally(() => {
      settled = true
    })
  const outcome = expect(done).rejects.toBe(failure)
  await turn()
  guest.at(0).fail(failure)
  await turn()
  expect(settled).toBe(false)
  guest.at(1).fail(new Error('another one, later in the file'))
  await outcome
  expect(guest.reads.length).toBe(2)
})

test('a guest that throws is one that rejects', async () => {
  const failure = new Error('not connected')
  let calls = 0
  const image = new ComposedImage(LAYOUT, {
    read() {
      calls++
      throw failure
    },
  })
  await expect(image.read(LAYOUT.dataStart, Buffer.alloc(LAYOUT.dataLength))).rejects.toBe(failure)
  expect(calls).toBe(2)
})

test('a signal reaches the guest, and one that has fired asks it for nothing', async () => {
  const guest = new ControlledGuest(DISK)
  const image = new ComposedImage(LAYOUT, guest)
  const abort = new AbortController()
  const done = image.read(LAYOUT.dataStart, Buffer.alloc(1), { signal: abort.signal })
  expect(guest.at(0).signal).toBe(abort.signal)
  guest.at(0).complete()
  await done

  const reason = new Error('given up')
  abort.abort(reason)
  await expect(image.read(LAYOUT.dataStart, Buffer.alloc(1), { signal: abort.signal })).rejects.toBe(reason)
  expect(guest.reads.length).toBe(1)
})

test('bytes outside the file are refused', async () => {
  const image = new ComposedImage(LAYOUT, new ControlledGuest(DISK))
  const refusal = (start: number, end: number) =>
    expect.objectContaining({
      code: 'QCOW2_ARGUMENT',
      message: `Bytes ${start} to ${end} are not within the image's ${image.size}.`,
      context: { start, end },
    })
  await image.read(image.size, Buffer.alloc(0))
  for (const [start, length] of [
    [-1, 1],
    [image.size, 1],
    [image.size - 1, 2],
    [0.5, 1],
    [image.size + 1, 0],
  ] as const)
    await expect(image.read(start, Buffer.alloc(length))).rejects.toEqual(refusal(start, start + length))
  for (const [start, end] of [
    [-1, 1],
    [2, 1],
    [0, image.size + 1],
    [0.5, 1],
    [0, 1.5],
  ] as const)
    expect(() => image.stream({ start, end })).toThrow(refusal(start, end))
})

test('a full image of nothing but zeros has no data to read', async () => {
  const list = new ExtentList()
  list.append(10 * CLUSTER, zero)
  const layout = planImage(list, { clusterSize: CLUSTER })
  const guest = new ControlledGuest(DISK)
  await new ComposedImage(layout, guest).read(0, Buffer.alloc(layout.fileSize))
  expect([guest.reads.length, layout.dataLength]).toEqual([0, 0])
})
