import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import {
  ComposedImage,
  ExtentKind,
  ExtentList,
  type ImageOptions,
  maxDiskSize,
  planImage,
} from '../src/index.ts'
import {
  BACKING,
  compose,
  extentsOf,
  type LayerPlan,
  layerPlans,
  listOf,
  memoryGuest,
  nextDisk,
} from './chain-model.ts'
import { checkRefcounts, walk } from './spec-walk.ts'

const { unallocated, zero, data } = ExtentKind
const KIB = 1024
const MIB = 1024 * KIB
const TIB = 1024 * 1024 * MIB

function refused(extents: ExtentList, options: ImageOptions, message: RegExp, context: object): void {
  expect(() => planImage(extents, options)).toThrow(
    expect.objectContaining({ code: 'QCOW2_ARGUMENT', message: expect.stringMatching(message), context }),
  )
}

test('every random image reads back as the disk, counts each cluster once, and holds no table it does not need', async () => {
  await fc.assert(
    fc.asyncProperty(
      layerPlans(16, MIB),
      layerPlans(16, MIB),
      fc.boolean(),
      async (plan, older, hasParent) => {
        const parent = hasParent ? nextDisk(undefined, older) : undefined
        const disk = nextDisk(parent, plan)
        const { layout, file } = await compose(plan, disk, hasParent ? BACKING : undefined)
        const read = walk(file, parent)
        expect(read.disk.equals(disk)).toBe(true)
        expect(read.backingName).toBe(hasParent ? BACKING.name : undefined)
        expect(checkRefcounts(file)).toEqual([])
        expect([layout.virtualSize, layout.clusterSize]).toEqual([disk.length, plan.clusterSize])
      },
    ),
    { numRuns: 100 },
  )
}, 30_000)

test('the same extents give the same bytes, however they were appended', async () => {
  const plan: LayerPlan = {
    clusterSize: 4096,
    size: 100_000,
    runs: [
      [data, 3],
      [zero, 2],
      [data, 9],
    ],
    seed: 1,
  }
  const disk = nextDisk(undefined, plan)
  const { file } = await compose(plan, disk, BACKING)
  const list = new ExtentList(1)
  const whole = extentsOf(plan)
  for (let i = 0; i < whole.count; i++) {
    for (let at = 0; at < whole.length(i); at += 4096)
      list.append(Math.min(4096, whole.length(i) - at), whole.kind(i))
  }
  const again = Buffer.alloc(file.length)
  await new ComposedImage(planImage(list, { clusterSize: 4096, backing: BACKING }), memoryGuest(disk)).read(
    0,
    again,
  )
  expect(again.equals(file)).toBe(true)
})

test('a layout does not change when the list that it was planned from goes on', () => {
  const list = listOf([65536, data])
  const layout = planImage(list)
  const before = Buffer.alloc(layout.dataStart)
  layout.readMetadata(0, before)
  list.append(10 * 65536, data)
  const after = Buffer.alloc(layout.dataStart)
  layout.readMetadata(0, after)
  expect(after.equals(before)).toBe(true)
})

describe('zeros', () => {
  const runs = [
    [65536, data],
    [65536, zero],
    [65536, unallocated],
    [65536, data],
  ] as [number, ExtentKind][]

  test('need no space in a full image', () => {
    const layout = planImage(listOf(...runs))
    expect(layout.dataLength).toBe(2 * 65536)
    expect(planImage(listOf([TIB, zero])).dataStart).toBe(planImage(listOf([TIB, unallocated])).dataStart)
  })

  test('are explicit zero clusters over a backing file', async () => {
    const plan: LayerPlan = {
      clusterSize: 65536,
      size: 262_144,
      runs: runs.map(([, kind]) => [kind, 1]),
      seed: 1,
    }
    const { file, layout } = await compose(plan, nextDisk(undefined, plan), BACKING)
    const { dataStart } = layout
    expect(walk(file).clusters).toEqual([dataStart, 'zero', 'unallocated', dataStart + 65536])
    expect(file.readBigUInt64BE(dataStart - 65536 + 8)).toBe(1n) // bit 0 and nothing else
  })
})

describe('sizes', () => {
  test.each([
    [0, 0],
    [1, 512],
    [511, 512],
    [512, 512],
    [513, 1024],
    [65535, 65536],
    [65537, 66048],
  ])('a disk of %i bytes is one of %i in the image', (size, virtualSize) => {
    expect(planImage(listOf([size, data])).virtualSize).toBe(virtualSize)
  })

  test('the image of no disk has a header, a refcount table and a refcount block', () => {
    const layout = planImage(new ExtentList())
    expect([layout.fileSize, layout.dataStart, layout.dataLength]).toEqual([3 * 65536, 3 * 65536, 0])
  })

  // clusters: header, refcount table, refcount block, L1 table, L2 tables, data
  test.each([
    { name: 'one cluster', size: 4096, clusters: 1 + 1 + 1 + 1 + 1 + 1 },
    { name: 'a full L2 table', size: 2 * MIB, clusters: 1 + 1 + 1 + 1 + 1 + 512 },
    { name: 'one byte more than an L2 table', size: 2 * MIB + 1, clusters: 1 + 1 + 1 + 1 + 2 + 513 },
    { name: 'a full refcount block', size: 2040 * 4096, clusters: 2048 },
    { name: 'one cluster more than a refcount block', size: 2041 * 4096, clusters: 2050 },
    { name: 'a full L1 cluster', size: 512 * 2 * MIB, clusters: 1 + 1 + 129 + 1 + 512 + 512 * 512 },
    {
      name: 'one byte more than an L1 cluster',
      size: 512 * 2 * MIB + 1,
      clusters: 1 + 1 + 129 + 2 + 513 + 512 * 512 + 1,
    },
  ])('$name of 4 KiB clusters makes a file of $clusters clusters', ({ size, clusters }) => {
    expect(planImage(listOf([size, data]), { clusterSize: 4096 }).fileSize / 4096).toBe(clusters)
  })

  test('the refcount table grows to a second cluster when its first is full', () => {
    // 512 blocks of 2048 counts: 1,048,576 clusters; 1 + 1 + 512 + 4 (L1 of 4 GiB) + L2 tables + data
    const sizes = [1_046_015, 1_046_016].map(clusters => {
      const layout = planImage(listOf([clusters * 4096, data], [4096 * MIB - clusters * 4096, unallocated]), {
        clusterSize: 4096,
      })
      const header = Buffer.alloc(4096)
      layout.readMetadata(0, header)
      return { total: layout.fileSize / 4096, tableClusters: header.readUInt32BE(56) }
    })
    expect(sizes).toEqual([
      { total: 1 + 1 + 512 + 4 + 2043 + 1_046_015, tableClusters: 1 },
      { total: 1 + 2 + 513 + 4 + 2043 + 1_046_016, tableClusters: 2 },
    ])
  })
})

describe('limits', () => {
  test.each([4096, 8192, 65536, 2 * MIB])('clusters of %i bytes are fine', clusterSize => {
    expect(planImage(listOf([clusterSize, data]), { clusterSize }).clusterSize).toBe(clusterSize)
  })

  test.each([0, 1, 512, 2048, 4095, 4097, 65535, 3 * 65536, 4 * MIB, -4096, Number.NaN])(
    'clusters of %d bytes are refused',
    clusterSize =>
      refused(new ExtentList(), { clusterSize }, /^Not a cluster size: .* power of two from 4096/, {
        clusterSize,
      }),
  )

  test('the L1 table ends at 32 MiB', () => {
    const clusterSize = 4096
    expect(planImage(listOf([8 * TIB, unallocated]), { clusterSize }).virtualSize).toBe(8 * TIB)
    const oneMore = { virtualSize: 8 * TIB + 512, clusterSize }
    refused(listOf([8 * TIB + 1, unallocated]), { clusterSize }, /L1 table over 32 MiB/, oneMore)
    expect(planImage(listOf([2048 * TIB, unallocated])).virtualSize).toBe(2048 * TIB)
    expect([maxDiskSize(4096), maxDiskSize(65_536)]).toEqual([8 * TIB, 2048 * TIB])
    refused(listOf([2048 * TIB + 1, unallocated]), {}, /L1 table over 32 MiB/, {
      virtualSize: 2048 * TIB + 512,
      clusterSize: 65_536,
    })
  })

  test('the refcount table ends at 8 MiB', () => {
    // 2^20 blocks of 2^11 counts; from their clusters: header, table, blocks, L1 table and L2 tables
    const most = 2 ** 31 - (1 + 2048 + 2 ** 20 + 8192)
    const clusters = Math.floor((most * 512) / 513)
    const full = (count: number): ExtentList =>
      listOf([count * 4096, data], [8 * TIB - count * 4096, unallocated])
    const layout = planImage(full(clusters), { clusterSize: 4096 })
    expect(layout.fileSize / 4096).toBeGreaterThan(2 ** 31 - 2)
    refused(full(clusters + 1), { clusterSize: 4096 }, /refcount table over 8 MiB/, {
      virtualSize: 8 * TIB,
      clusterSize: 4096,
    })
  })

  test('a disk or an image over 2^53 bytes is refused', () => {
    const clusterSize = 2 * MIB
    const most = 2 ** 53 - clusterSize
    expect(planImage(listOf([most, unallocated]), { clusterSize }).virtualSize).toBe(most)
    refused(listOf([2 ** 53 - 1, unallocated]), { clusterSize }, /over 2\^53/, { virtualSize: 2 ** 53 })
    refused(listOf([most, data]), { clusterSize }, /over 2\^53/, { virtualSize: most })
  })

  test('a run that begins inside a cluster is refused, whatever its kind', () => {
    const inside = (start: number) => ({ start, clusterSize: 65_536 })
    refused(listOf([65536, data], [100, zero], [65436, data]), {}, /Extent 2 begins at 65636/, inside(65_636))
    refused(listOf([512, data], [65024, unallocated]), {}, /Extent 1 begins at 512/, inside(512))
    expect(planImage(listOf([65536, data], [100, zero])).virtualSize).toBe(66048)
  })

  test('a backing file name has 1 to 1023 bytes and no zero byte', () => {
    const name = (text: string): ImageOptions => ({ backing: { name: text, format: 'qcow2' } })
    expect(() => planImage(new ExtentList(), name('a'.repeat(1023)))).not.toThrow()
    expect(() => planImage(new ExtentList(), name(`${'é'.repeat(511)}a`))).not.toThrow()
    for (const text of ['', 'a'.repeat(1024), 'é'.repeat(512), 'a\0b']) {
      const length = Buffer.byteLength(text)
      const shown = JSON.stringify(text.slice(0, 100)).replaceAll('\\', '\\\\')
      refused(new ExtentList(), name(text), RegExp(`^Not a backing file name: ${shown}\\. It has`), {
        length,
      })
    }
  })

  test.each(['nbd://host/x', 'json:{}', 'disk:1.qcow2', ':', `${'a'.repeat(200)}:`])(
    'QEMU would take %s for an address: refused',
    name => {
      const message = RegExp(`name "${name.slice(0, 100)}" for an address. Begin it with "./"`)
      refused(new ExtentList(), { backing: { name, format: 'raw' } }, message, { length: name.length })
      for (const path of [`./${name}`, `a/${name}`])
        expect(() => planImage(new ExtentList(), { backing: { name: path, format: 'raw' } })).not.toThrow()
    },
  )

  test('a backing format is qcow2 or raw', () => {
    const backing = { name: 'a', format: 'vmdk' as 'raw' }
    refused(new ExtentList(), { backing }, /^Not a backing format: vmdk/, {})
  })
})
