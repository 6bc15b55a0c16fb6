import { FUZZ_TIMEOUT_MS, fuzz } from '@varve/testkit'
import fc from 'fast-check'
import { expect, test } from 'vitest'
import { ExtentKind, type ImageFile, openImage, type Qcow2Image } from '../src/index.ts'
import { BACKING, compose, type LayerPlan, layerPlans, memoryFile, nextDisk } from './chain-model.ts'
import { walk } from './spec-walk.ts'

const MIB = 2 ** 20
const COPIED = 1n << 63n

/** A file that fails the test when it is read outside its bounds, in large pieces, or more than once anywhere. */
function watchedFile(bytes: Uint8Array): ImageFile & { readonly total: number } {
  const { read } = memoryFile(bytes)
  let total = 0
  return {
    size: bytes.length,
    get total() {
      return total
    },
    async read(offset, into) {
      if (!Number.isSafeInteger(offset) || offset < 0 || offset + into.length > bytes.length)
        expect.fail(`read of ${into.length} bytes at ${offset} of ${bytes.length}`)
      if (into.length > 4 * MIB) expect.fail(`read of ${into.length} bytes at once`)
      total += into.length
      await read(offset, into)
    },
  }
}

/** Opens mangled bytes: the image, or undefined where they are refused as they should be. */
async function openMangled(bytes: Uint8Array): Promise<Qcow2Image | undefined> {
  const file = watchedFile(bytes)
  try {
    return await openImage(file)
  } catch (error) {
    expect(error).toMatchObject({
      name: 'Qcow2Error',
      code: expect.stringMatching(/^QCOW2_(INVALID|UNSUPPORTED)$/),
    })
    return undefined
  } finally {
    expect(file.total).toBeLessThanOrEqual(bytes.length)
  }
}

/** What an image reads as over a disk, by its extents. */
function readDisk(image: Qcow2Image, file: Uint8Array, parent: Uint8Array): Buffer {
  const disk = Buffer.alloc(image.virtualSize)
  const { extents } = image
  let covered = 0
  for (let i = 0; i < extents.count; i++) {
    const start = extents.start(i)
    const end = start + extents.length(i)
    expect(start).toBe(covered)
    covered = end
    const from = extents.fileOffset(i)
    if (extents.kind(i) === ExtentKind.data) disk.set(file.subarray(from, from + end - start), start)
    if (extents.kind(i) === ExtentKind.unallocated) disk.set(parent.subarray(start, end), start)
  }
  expect(covered).toBe(image.virtualSize)
  return disk
}

const values = fc.oneof(
  fc.constantFrom(0n, 1n, 1n << 62n, COPIED, (1n << 64n) - 1n, (1n << 56n) - 512n, 1n << 53n),
  fc.nat(64).map(cluster => COPIED | (BigInt(cluster) << 12n)),
  fc.nat(64).map(cluster => BigInt(cluster) << 12n),
  fc.bigInt({ min: 0n, max: (1n << 64n) - 1n }),
)

type Mutation = (file: Buffer, metadata: number) => void

const mutation: fc.Arbitrary<Mutation> = fc.oneof(
  fc.tuple(fc.nat(), fc.nat(255)).map(
    ([at, value]): Mutation =>
      (file, metadata) => {
        file[at % metadata] = value
      },
  ),
  fc.tuple(fc.nat(), fc.nat(7)).map(
    ([at, bit]): Mutation =>
      (file, metadata) => {
        file[at % metadata] = (file[at % metadata] ?? 0) ^ (1 << bit)
      },
  ),
  fc.tuple(fc.nat(200), fc.nat(255)).map(
    ([at, value]): Mutation =>
      file => {
        file[at] = value
      },
  ),
  fc.tuple(fc.nat(), values).map(
    ([at, value]): Mutation =>
      (file, metadata) => {
        file.writeBigUInt64BE(value, Math.floor((at % metadata) / 8) * 8)
      },
  ),
  // entries of the refcount table, of the L1 table and of the first L2 table, which is what an attack would turn to
  fc.tuple(fc.nat(3), values).map(
    ([index, value]): Mutation =>
      file => {
        const table = Number(file.readBigUInt64BE(48))
        if (table + index * 8 + 8 <= file.length) file.writeBigUInt64BE(value, table + index * 8)
      },
  ),
  fc.tuple(fc.nat(80), values).map(
    ([index, value]): Mutation =>
      (file, metadata) => {
        const l1 = Number(file.readBigUInt64BE(40))
        if (l1 + index * 8 + 8 <= metadata) file.writeBigUInt64BE(value, l1 + index * 8)
      },
  ),
  fc.tuple(fc.nat(80), values).map(
    ([index, value]): Mutation =>
      (file, metadata) => {
        const at = Number(file.readBigUInt64BE(40)) + 4096 + index * 8
        if (at + 8 <= metadata) file.writeBigUInt64BE(value, at)
      },
  ),
)

test(
  'a mangled image is refused, or read as the specification says',
  async () => {
    let opened = 0
    const parent = nextDisk(undefined, {
      clusterSize: 4096,
      size: MIB,
      runs: [[ExtentKind.data, 256]],
      seed: 9,
    })
    await fc.assert(
      fc.asyncProperty(
        layerPlans(13, MIB),
        fc.boolean(),
        fc.array(mutation, { minLength: 1, maxLength: 4 }),
        fc.option(fc.nat(), { freq: 5, nil: undefined }),
        async (plan, hasParent, mutations, cut) => {
          const { file, layout } = await compose(
            plan,
            nextDisk(undefined, plan),
            hasParent ? BACKING : undefined,
          )
          for (const mutate of mutations) mutate(file, layout.dataStart)
          const bytes = cut === undefined ? file : file.subarray(0, cut % (file.length + 1))
          const image = await openMangled(bytes)
          if (!image) return
          opened++
          if (image.virtualSize > 64 * MIB) return // a size that grew within one L1 entry: too slow to walk
          const below = image.backing ? parent : Buffer.alloc(0)
          expect(readDisk(image, bytes, below).equals(walk(bytes, below).disk)).toBe(true)
        },
      ),
      fuzz(400),
    )
    expect(opened).toBeGreaterThan(15) // else this would show nothing
  },
  FUZZ_TIMEOUT_MS,
)

test(
  'a random header before random bytes is refused, or read within bounds',
  async () => {
    const word = fc.oneof(
      fc.nat(20),
      fc.nat(0xffffffff),
      fc.constantFrom(0xffffffff, 0x80000000, 104, 112, 4096),
    )
    const offset = fc.oneof(
      fc.nat(16).map(cluster => BigInt(cluster * 4096)),
      values,
    )
    await fc.assert(
      fc.asyncProperty(
        fc.record({
          backingOffset: fc.oneof(fc.constant(0n), offset),
          backingLength: fc.oneof(fc.constant(0), word),
          clusterBits: fc.oneof({ arbitrary: fc.constant(12), weight: 5 }, word),
          size: fc.oneof(
            fc.nat(20).map(count => BigInt(count) * 1048576n),
            values,
          ),
          l1Size: fc.oneof(fc.nat(10), word),
          l1Offset: offset,
          refcountOffset: offset,
          refcountClusters: fc.oneof({ arbitrary: fc.constant(1), weight: 5 }, word),
          headerLength: fc.oneof({ arbitrary: fc.constantFrom(104, 112), weight: 5 }, word),
          body: fc.uint8Array({ maxLength: 4096, size: 'max' }),
          clusters: fc.nat(16),
        }),
        async fields => {
          const file = Buffer.alloc(Math.max(112, fields.clusters * 4096))
          file.fill(fields.body.length > 0 ? fields.body : 0, 112)
          file.write('QFI\xfb', 0, 'latin1')
          file.writeUInt32BE(3, 4)
          file.writeBigUInt64BE(fields.backingOffset, 8)
          file.writeUInt32BE(fields.backingLength, 16)
          file.writeUInt32BE(fields.clusterBits, 20)
          file.writeBigUInt64BE(fields.size, 24)
          file.writeUInt32BE(fields.l1Size, 36)
          file.writeBigUInt64BE(fields.l1Offset, 40)
          file.writeBigUInt64BE(fields.refcountOffset, 48)
          file.writeUInt32BE(fields.refcountClusters, 56)
          file.writeUInt32BE(4, 96)
          file.writeUInt32BE(fields.headerLength, 100)
          await openMangled(file)
        },
      ),
      fuzz(500),
    )
  },
  FUZZ_TIMEOUT_MS,
)

test('random bytes are refused', async () => {
  await fc.assert(
    fc.asyncProperty(fc.uint8Array({ maxLength: 8192, size: 'max' }), async bytes => {
      expect(await openMangled(bytes)).toBeUndefined()
    }),
  )
})

test('a large L1 table that points at one L2 table again and again is refused at the second entry', async () => {
  const file = Buffer.alloc(4 * MIB + 4 * 4096)
  const { file: small } = await compose(
    { clusterSize: 4096, size: 2 * MIB, runs: [], seed: 0 },
    Buffer.alloc(0),
  )
  small.copy(file)
  file.writeUInt32BE(2 ** 19, 36)
  file.writeBigUInt64BE(2n ** 40n, 24)
  const table = file.length - 4096
  for (let i = 0; i < 2 ** 19; i++) file.writeBigUInt64BE(COPIED | BigInt(table), 3 * 4096 + i * 8)
  await expect(openImage(watchedFile(file))).rejects.toMatchObject({
    code: 'QCOW2_INVALID',
    context: { table: 'L1', index: 1 },
  })
})

test('what a header claims is checked against the size of the file before it is read', async () => {
  const plan: LayerPlan = { clusterSize: 4096, size: 0, runs: [], seed: 0 }
  const { file } = await compose(plan, Buffer.alloc(0))
  file.writeBigUInt64BE(8n << 40n, 24)
  file.writeUInt32BE(4 * MIB, 36) // 32 MiB of L1 table in a file of three clusters
  file.writeBigUInt64BE(2n * 4096n, 40)
  const watched = watchedFile(file)
  await expect(openImage(watched)).rejects.toMatchObject({ code: 'QCOW2_INVALID' })
  expect(watched.total).toBe(4096)
})
