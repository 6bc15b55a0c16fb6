import { randomBytes } from 'node:crypto'
import { FUZZ_TIMEOUT_MS, fuzz } from '@varve/testkit'
import fc from 'fast-check'
import { expect, test } from 'vitest'
import { BlockPool, type BlockSlot } from '../src/block-pool.ts'
import { BlockDigester } from '../src/digest.ts'
import { VerifiedObject } from '../src/verified-object.ts'
import { MemoryStorage, type MemoryStorageOptions } from './memory-storage.ts'

const BLOCK = 1000
const { signal } = new AbortController()

interface Opened {
  storage: MemoryStorage
  bytes: Buffer
  pool: BlockPool
  open: () => Promise<VerifiedObject>
}

function stored(size: number, options: MemoryStorageOptions = {}): Opened {
  const storage = new MemoryStorage(options)
  const bytes = randomBytes(size)
  const digester = new BlockDigester(BLOCK)
  digester.update(bytes)
  const { digest, blocks } = digester.finish()
  storage.objects.set('object', Buffer.from(bytes))
  storage.objects.set('blocks', Buffer.from(blocks))
  const pool = new BlockPool(8 * BLOCK, BLOCK)
  const retry = { backoffMs: 0 }
  const object = { storage, key: 'object', size, digest, blocksKey: 'blocks', pool, retry }
  return { storage, bytes, pool, open: () => VerifiedObject.open(object) }
}

test('any range of an object reads as it was stored, in any order and many at once', {
  timeout: FUZZ_TIMEOUT_MS,
}, async () => {
  const ranges = fc.array(fc.tuple(fc.nat(9_500), fc.nat(9_500)), { minLength: 1, maxLength: 8 })
  await fc.assert(
    fc.asyncProperty(ranges, fc.integer({ min: 1, max: 2500 }), async (pairs, chunkSize) => {
      const { bytes, pool, open } = stored(9_500, { chunkSize })
      const object = await open()
      await Promise.all(
        pairs.map(async pair => {
          const [start = 0, end = 0] = pair.toSorted((a, b) => a - b)
          const into = new Uint8Array(end - start)
          await object.read(start, into)
          expect(Buffer.compare(into, bytes.subarray(start, end))).toBe(0)
        }),
      )
      expect(pool.inUse).toBe(0)
    }),
    fuzz(40),
  )
})

test('reads that follow one another fetch no block twice', async () => {
  const { storage, open } = stored(10_000)
  const object = await open()
  const reads = Array.from({ length: 25 }, (_, i) => object.read(i * 400, new Uint8Array(400)))
  await Promise.all(reads)
  expect(storage.timesFetched('object', BLOCK)).toStrictEqual(new Array(10).fill(1))
})

test('a run of blocks is one download, and the cached block is none', async () => {
  const { storage, bytes, pool, open } = stored(9_500)
  const object = await open()
  await object.read(3_100, new Uint8Array(100))
  const got: Buffer[] = []
  const take = (block: number, slot: BlockSlot): void => {
    got.push(Buffer.from(slot.bytes))
    expect(block).toBe(got.length)
    pool.release(slot)
  }
  await object.fetch(1, 10, take, signal)
  expect(Buffer.concat(got)).toStrictEqual(bytes.subarray(1_000))
  const ranges = storage.downloads.filter(({ key }) => key === 'object').map(({ range }) => range)
  expect(ranges).toStrictEqual([
    { start: 3_000, end: 4_000 },
    { start: 1_000, end: 3_000 },
    { start: 4_000, end: 9_500 },
  ])
})

test('a block that is not what was stored is named, and those before it are handed over', async () => {
  const { storage, pool, open } = stored(9_500)
  const object = await open()
  const damaged = storage.objects.get('object')
  damaged?.writeUInt8((damaged.readUInt8(6_123) + 1) % 256, 6_123)
  const blocks: number[] = []
  const take = (block: number, slot: BlockSlot): void => {
    blocks.push(block)
    pool.release(slot)
  }
  await expect(object.fetch(2, 10, take, signal)).rejects.toMatchObject({
    code: 'DIGEST_MISMATCH',
    context: { key: 'object', block: 6, offset: 6_000 },
  })
  expect(blocks).toStrictEqual([2, 3, 4, 5])
  expect(pool.inUse).toBe(0)
  await expect(object.read(6_900, new Uint8Array(200))).rejects.toMatchObject({ code: 'DIGEST_MISMATCH' })
  await object.read(7_000, new Uint8Array(200)) // one that failed does not stop the next
})

test('a list of digests of another object is refused', async () => {
  const { storage, open } = stored(9_500)
  storage.objects.set('blocks', randomBytes(10 * 32))
  await expect(open()).rejects.toMatchObject({ code: 'DIGEST_MISMATCH', context: { key: 'blocks' } })
})

test('a mangled list of digests is refused, whatever its length', {
  timeout: FUZZ_TIMEOUT_MS,
}, async () => {
  const { storage, open } = stored(9_500)
  const list = storage.objects.get('blocks') ?? expect.fail()
  await fc.assert(
    fc.asyncProperty(fc.nat(), fc.nat(255), fc.nat(640), async (at, value, length) => {
      const mangled = Buffer.alloc(length)
      list.copy(mangled)
      mangled[at % Math.max(1, length)] = value
      storage.objects.set('blocks', mangled)
      const outcome = await open().then(
        () => 'opened',
        error => error.code,
      )
      expect(outcome).toBe(
        length !== list.length ? 'SIZE_MISMATCH' : mangled.equals(list) ? 'opened' : 'DIGEST_MISMATCH',
      )
    }),
    fuzz(200),
  )
})

test('bytes outside the object are refused', async () => {
  const { open } = stored(9_500)
  const object = await open()
  for (const offset of [-1, 9_499, 0.5, Number.NaN])
    await expect(object.read(offset, new Uint8Array(2))).rejects.toMatchObject({ code: 'INVALID_ARGUMENT' })
})
