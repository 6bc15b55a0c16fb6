import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { ExtentKind, ExtentList, type ImageOptions, planImage } from '../src/index.ts'
import { BACKING, compose, extentsOf, type LayerPlan, layerPlans, listOf, nextDisk } from './chain-model.ts'
import { checkRefcounts, walk } from './spec-walk.ts'

const { unallocated, zero, data } = ExtentKind
const KIB = 1024
const MIB = 1024 * KIB

test('data lies in ascending guest order right after the metadata, and the layout says where', async () => {
  await fc.assert(
    fc.asyncProperty(layerPlans(14, MIB), async plan => {
      const { layout, file } = await compose(plan, nextDisk(undefined, plan), BACKING)
      let next = layout.dataStart
      for (const [cluster, place] of walk(file).clusters.entries()) {
        const at = cluster * layout.clusterSize
        const last = Math.min(at + layout.clusterSize, layout.virtualSize) - 1
        if (typeof place === 'number') {
          expect(place).toBe(next)
          next += layout.clusterSize
          expect([layout.fileOffset(at), layout.fileOffset(last)]).toEqual([place, place + last - at])
        } else expect([layout.fileOffset(at), layout.fileOffset(last)]).toEqual([undefined, undefined])
      }
      expect([layout.fileSize, layout.dataLength]).toEqual([next, next - layout.dataStart])
      expect(layout.fileOffset(layout.virtualSize)).toBeUndefined()
      expect(layout.fileOffset(-1)).toBeUndefined()
    }),
  )
})

test.each([2039, 2040, 2041, 4082, 4083, 4084, 6200])(
  'the refcounts of %i clusters of data are right, over as many blocks as that takes',
  async clusters => {
    // with the other clusters, 2040 of them fill the first block and 4083 the second
    const plan: LayerPlan = { clusterSize: 4096, size: 28 * MIB, runs: [[data, clusters]], seed: 1 }
    const { file } = await compose(plan, nextDisk(undefined, plan))
    expect(checkRefcounts(file)).toEqual([])
  },
)

describe('the header', () => {
  function headerOf(extents: ExtentList, options: ImageOptions): Buffer {
    const layout = planImage(extents, options)
    const cluster = Buffer.alloc(layout.clusterSize, 0xee)
    layout.readMetadata(0, cluster)
    return cluster
  }

  test('is, for a full image, that of the specification', () => {
    const header = headerOf(listOf([200_000, data]), {})
    const expected = Buffer.alloc(65536)
    expected.write('QFI\xfb', 0, 'latin1')
    expected.writeUInt32BE(3, 4) // version
    expected.writeUInt32BE(16, 20) // cluster bits
    expected.writeBigUInt64BE(200_192n, 24) // size, whole sectors
    expected.writeUInt32BE(1, 36) // L1 entries
    expected.writeBigUInt64BE(3n * 65536n, 40) // L1 table
    expected.writeBigUInt64BE(65536n, 48) // refcount table
    expected.writeUInt32BE(1, 56) // its clusters
    expected.writeUInt32BE(4, 96) // 16-bit refcounts
    expected.writeUInt32BE(112, 100) // header length
    expect(header.equals(expected)).toBe(true)
  })

  test.each([
    { format: 'qcow2', extension: 'e2792aca0000000571636f7732000000' },
    { format: 'raw', extension: 'e2792aca000000037261770000000000' },
  ] as const)('names a backing file and its format $format', ({ format, extension }) => {
    const header = headerOf(listOf([4096, data]), {
      clusterSize: 4096,
      backing: { name: '../é/vda', format },
    })
    expect(header.toString('hex', 112, 136)).toBe(`${extension}${'00'.repeat(8)}`)
    expect(header.readBigUInt64BE(8)).toBe(136n)
    expect(header.readUInt32BE(16)).toBe(9)
    expect(header.toString('utf8', 136, 145)).toBe('../é/vda')
    expect(header.subarray(145).every(byte => byte === 0)).toBe(true)
  })
})

test('any range of it is a slice of the whole', () => {
  fc.assert(
    fc.property(layerPlans(13, MIB), fc.nat(), fc.nat(), fc.boolean(), (plan, a, b, hasParent) => {
      const options = { clusterSize: plan.clusterSize, ...(hasParent ? { backing: BACKING } : {}) }
      const layout = planImage(extentsOf(plan), options)
      const whole = Buffer.alloc(layout.dataStart, 0xee)
      layout.readMetadata(0, whole)
      const start = a % layout.dataStart
      const part = Buffer.alloc(b % (layout.dataStart - start + 1), 0xee)
      layout.readMetadata(start, part)
      expect(part.equals(whole.subarray(start, start + part.length))).toBe(true)
    }),
    { numRuns: 500 },
  )
})

describe('pieces of any few bytes make up the whole', () => {
  function inPieces(list: ExtentList, sizes: readonly number[]): void {
    const layout = planImage(list, { clusterSize: 4096, backing: BACKING })
    const whole = Buffer.alloc(layout.dataStart)
    layout.readMetadata(0, whole)
    for (const size of sizes) {
      const pieces = Buffer.alloc(layout.dataStart, 0xee)
      for (let at = 0; at < pieces.length; at += size) layout.readMetadata(at, pieces.subarray(at, at + size))
      expect(pieces.equals(whole), `pieces of ${size}`).toBe(true)
    }
  }

  test('of tables of one cluster', () => {
    const list = listOf([4096 * 700, data], [4096 * 3, unallocated], [4096, zero], [9, data])
    inPieces(list, [1, 2, 3, 5, 7, 8, 9, 15, 17, 4095, 4097, 5003, 7000, 10_001])
  })

  test('of several refcount blocks', () => inPieces(listOf([4096 * 6200, data]), [8, 13, 5003]))

  test('of L2 tables with gaps in the L1 table between', () => {
    const list = new ExtentList()
    for (let i = 0; i < 4; i++) {
      list.append(4096 * 500, data)
      list.append(64 * MIB - 4096 * 500, unallocated)
    }
    inPieces(list, [8, 24, 5003, 7000])
  })
})

test.each<{ name: string; runs: [ExtentKind, number][]; tables: number }>([
  {
    name: 'goes on into the next',
    runs: [
      [data, 1],
      [unallocated, 1],
      [data, 600],
    ],
    tables: 2,
  },
  {
    name: 'goes on over several',
    runs: [
      [zero, 1],
      [data, 5],
      [unallocated, 500],
      [data, 1100],
      [zero, 2],
    ],
    tables: 4,
  },
  {
    name: 'ends with it',
    runs: [
      [data, 3],
      [zero, 509],
      [unallocated, 512],
      [data, 1],
    ],
    tables: 2,
  },
])('a run in the L2 table of another that $name takes no table twice', async ({ runs, tables }) => {
  const plan: LayerPlan = { clusterSize: 4096, size: 7 * MIB, runs, seed: 1 }
  const disk = nextDisk(undefined, plan)
  const { file, layout } = await compose(plan, disk, BACKING)
  expect(checkRefcounts(file)).toEqual([])
  expect(walk(file).disk.equals(disk)).toBe(true)
  expect(layout.dataStart / 4096).toBe(4 + tables) // after the header, the refcount table and block, and the L1 table
})

test('offsets over 4 GiB and over 1 TiB are whole', () => {
  for (const clusters of [2 ** 17, 2 ** 25]) {
    const layout = planImage(listOf([clusters * 65536, data]))
    const last = Buffer.alloc(8)
    layout.readMetadata(layout.dataStart - 65536 + ((clusters - 1) % 8192) * 8, last)
    const offset = BigInt(layout.dataStart) + BigInt(clusters - 1) * 65536n
    expect(last.readBigUInt64BE()).toBe((1n << 63n) | offset)
    expect(layout.fileOffset((clusters - 1) * 65536)).toBe(Number(offset))
  }
})

test('it ends where the data begins', () => {
  const layout = planImage(listOf([65536, data]))
  layout.readMetadata(layout.dataStart - 1, Buffer.alloc(1))
  layout.readMetadata(layout.dataStart, Buffer.alloc(0))
  for (const [start, length] of [
    [layout.dataStart, 1],
    [layout.dataStart - 1, 2],
    [-1, 1],
    [0.5, 1],
  ] as const)
    expect(() => layout.readMetadata(start, Buffer.alloc(length))).toThrow(
      expect.objectContaining({
        code: 'QCOW2_ARGUMENT',
        message: `Bytes ${start} to ${start + length} are not within the ${layout.dataStart} bytes of metadata.`,
        context: { start, end: start + length },
      }),
    )
})

test('the tables of a disk that is spread thin are found among millions of L1 entries', () => {
  const gap = 64 * 1024 * MIB
  const list = new ExtentList()
  for (let i = 0; i < 100; i++) {
    list.append(8192, i % 3 === 0 ? zero : data)
    list.append(gap - 8192, unallocated)
  }
  const layout = planImage(list, { clusterSize: 4096, backing: BACKING })
  const read = (at: number): bigint => {
    const entry = Buffer.alloc(8)
    layout.readMetadata(at, entry)
    return entry.readBigUInt64BE() & 0x00fffffffffffe00n
  }
  const header = Buffer.alloc(4096)
  layout.readMetadata(0, header)
  const l1 = Number(header.readBigUInt64BE(40))
  for (let i = 0; i < 100; i++) {
    const index = (i * gap) / (2 * MIB)
    const l2 = Number(read(l1 + index * 8))
    expect(l2).toBe(layout.dataStart - (100 - i) * 4096)
    expect([read(l1 + index * 8 - 8), read(l1 + index * 8 + 8)].slice(i === 0 ? 1 : 0)).toEqual(
      i === 0 ? [0n] : [0n, 0n],
    )
    expect(Number(read(l2 + 8))).toBe(layout.fileOffset(i * gap + 4096) ?? 0)
  }
})
