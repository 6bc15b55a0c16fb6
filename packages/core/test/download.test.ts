import { Readable } from 'node:stream'
import { afterAll, beforeAll, describe, expect, test, vi } from 'vitest'
import { BlockAssembler } from '../src/block-assembler.ts'
import { BlockPool } from '../src/block-pool.ts'
import { type DownloadRetry, download } from '../src/download.ts'
import { VarveError } from '../src/errors.ts'
import type { ObjectStream } from '../src/storage.ts'
import { MemoryStorage } from './memory-storage.ts'

beforeAll(() => {
  vi.useFakeTimers({ toFake: ['setTimeout', 'clearTimeout'] })
})

afterAll(() => {
  vi.useRealTimers()
})

const BYTES = Buffer.from(Array.from({ length: 1000 }, (_, i) => i % 251))

function storageWith(fault?: (key: string, offset: number) => 'end' | undefined): MemoryStorage {
  const storage = new MemoryStorage({ chunkSize: 100, ...(fault && { fault }) })
  storage.objects.set('object', BYTES)
  return storage
}

/** Downloads bytes 50 to 950; a try begins at the last multiple of 50 before what has come. */
async function fetch(
  storage: MemoryStorage,
  retry: DownloadRetry = { backoffMs: 0 },
  signal: AbortSignal = new AbortController().signal,
): Promise<Buffer> {
  let got = Buffer.alloc(0)
  const range = { start: 50, end: 950 }
  await download(
    { storage, key: 'object', range, signal, retry },
    {
      async write(chunk) {
        got = Buffer.concat([got, chunk])
      },
      restart() {
        got = got.subarray(0, Math.floor(got.length / 50) * 50)
        return range.start + got.length
      },
    },
  )
  return got
}

/** Fails the first `times` chunks at or after `from`. */
function failing(times: number, from: number, error?: Error): (key: string, at: number) => 'end' | undefined {
  let left = times
  return (_, at) => {
    if (at < from || left-- <= 0) return undefined
    if (error) throw error
    return 'end'
  }
}

test('a download that ends early goes on from where the sink says', async () => {
  const storage = storageWith(failing(2, 400))
  expect(await fetch(storage)).toStrictEqual(BYTES.subarray(50, 950))
  expect(storage.downloads.map(({ range }) => range.start)).toStrictEqual([50, 450, 450])
})

test('a download that fails goes on where the error is one that may pass, or none of the driver', async () => {
  const passing = new VarveError('STORAGE_UNREACHABLE', 'away', { retryable: true })
  expect(await fetch(storageWith(failing(3, 0, passing)))).toStrictEqual(BYTES.subarray(50, 950))
  expect(await fetch(storageWith(failing(3, 0, new Error('ECONNRESET'))))).toStrictEqual(
    BYTES.subarray(50, 950),
  )
  const lasting = new VarveError('STORAGE_ACCESS_DENIED', 'no')
  await expect(fetch(storageWith(failing(1, 0, lasting)))).rejects.toBe(lasting)
  const reset = storageWith(failing(1, 0, new Error('ECONNRESET')))
  await expect(fetch(reset, { attempts: 1, backoffMs: 0 })).rejects.toMatchObject({
    code: 'STORAGE_FAILED',
    message: expect.stringMatching(/^The download of object broke off: ECONNRESET\. See .* try again\.$/),
  })
})

test('tries without progress are counted from the last progress, and bounded', async () => {
  const storage = storageWith(failing(3, 700))
  await expect(fetch(storage, { attempts: 3, backoffMs: 0 })).rejects.toMatchObject({
    code: 'STORAGE_FAILED',
    retryable: true,
    context: { key: 'object', offset: 750, end: 950 },
  })
  expect(storage.downloads.map(({ range }) => range.start)).toStrictEqual([50, 750, 750])
  let at = 0
  const everyChunk = storageWith((_, offset) => {
    if (offset <= at) return undefined
    at = offset
    return 'end'
  })
  expect(await fetch(everyChunk, { attempts: 2, backoffMs: 0 })).toStrictEqual(BYTES.subarray(50, 950))
})

test('a driver that sends more than was asked for is refused', async () => {
  const storage = storageWith()
  storage.get = async () => Readable.from([BYTES])
  await expect(fetch(storage)).rejects.toMatchObject({ code: 'STORAGE_FAILED', retryable: false })
})

test('a download without a byte for the stall time is broken off and begun again', async () => {
  const storage = storageWith()
  const real = storage.get.bind(storage)
  const stalled: Readable[] = []
  storage.get = async (key, options) => {
    if (stalled.length > 0) return real(key, options)
    const stream = new Readable({ read: () => queueMicrotask(() => vi.advanceTimersByTime(60_000)) })
    stalled.push(stream)
    return stream
  }
  expect(await fetch(storage)).toStrictEqual(BYTES.subarray(50, 950))
  expect(stalled[0]?.destroyed).toBe(true)
  stalled.length = 0
  await expect(fetch(storage, { attempts: 1 })).rejects.toMatchObject({
    code: 'TIMEOUT',
    retryable: true,
    context: { key: 'object', offset: 50 },
  })
})

test('a slow download is no stall, and neither is a sink that takes its time', async () => {
  const slow = storageWith(() => void vi.advanceTimersByTime(20_000))
  expect(await fetch(slow, { attempts: 1 })).toStrictEqual(BYTES.subarray(50, 950))
  const storage = storageWith()
  const taken: Buffer[] = []
  const { signal } = new AbortController()
  await download(
    { storage, key: 'object', range: { start: 0, end: 1000 }, signal, retry: { attempts: 1 } },
    {
      async write(chunk) {
        vi.advanceTimersByTime(200_000)
        taken.push(Buffer.from(chunk))
      },
      restart: () => 0,
    },
  )
  expect(Buffer.concat(taken)).toStrictEqual(BYTES)
})

test('a download that waits for other calls of the driver is no stall, and one that is silent afterwards is', async () => {
  for (const silent of [false, true]) {
    const storage = storageWith()
    const get = storage.get.bind(storage)
    storage.get = async (key, options) => {
      options?.onWait?.(true)
      vi.advanceTimersByTime(3_600_000)
      options?.onWait?.(false)
      options?.signal?.throwIfAborted()
      if (silent) vi.advanceTimersByTime(60_000)
      return get(key, options)
    }
    const fetched = fetch(storage, { attempts: 1 })
    if (silent) await expect(fetched).rejects.toMatchObject({ code: 'TIMEOUT', context: { stallMs: 60_000 } })
    else expect(await fetched).toStrictEqual(BYTES.subarray(50, 950))
  }
})

test('a download that is given up ends with the reason: while it waits for bytes, and between two tries', async () => {
  for (const retry of [{ stallMs: 60_000 }, { backoffMs: 60_000 }]) {
    const storage = storageWith(failing(1, 0, new Error('ECONNRESET')))
    const controller = new AbortController()
    const reason = new Error('enough')
    const get = storage.get.bind(storage)
    storage.get = async (key, options) => {
      setImmediate(() => setImmediate(() => controller.abort(reason)))
      return 'stallMs' in retry ? new Readable({ read: () => undefined }) : get(key, options)
    }
    await expect(fetch(storage, retry, controller.signal)).rejects.toMatchObject({
      code: 'ABORTED',
      cause: reason,
    })
  }
})

test('nothing is left open after a download, whether it worked or failed', async () => {
  for (const fault of [undefined, failing(1, 500, new VarveError('STORAGE_FAILED', 'no'))]) {
    const storage = storageWith(fault)
    const get = storage.get.bind(storage)
    const streams: Readable[] = []
    storage.get = async (key, options) => {
      const stream = await get(key, options)
      streams.push(stream)
      return stream
    }
    await fetch(storage).catch(() => undefined)
    expect(streams.map(({ destroyed }) => destroyed)).toStrictEqual([true])
  }
})

describe('a download right into memory', () => {
  /** Bytes 50 to 950 in blocks of 300, each in memory of its own as long as nothing fails. */
  async function fetchDirectly(
    storage: MemoryStorage,
    retry: DownloadRetry = { backoffMs: 0 },
    signal: AbortSignal = new AbortController().signal,
  ): Promise<Buffer> {
    const pool = new BlockPool(0, 300)
    const blocks: Buffer[] = []
    const object = { pool, blockSize: 300, size: BYTES.length, first: 0, signal }
    const assembler = new BlockAssembler(object, (_block, slot) => {
      blocks.push(Buffer.from(slot.bytes))
      pool.release(slot)
    })
    try {
      await download({ storage, key: 'object', range: { start: 0, end: 1000 }, signal, retry }, assembler)
    } finally {
      assembler.close()
      expect(pool.inUse).toBe(0)
    }
    return Buffer.concat(blocks)
  }

  const directStorage = (fault?: (key: string, offset: number) => 'end' | undefined): MemoryStorage => {
    const storage = new MemoryStorage({ chunkSize: 100, direct: true, ...(fault && { fault }) })
    storage.objects.set('object', BYTES)
    return storage
  }

  test('goes on from the last whole block, and a late write of a failed read reaches nothing', async () => {
    const passing = new VarveError('STORAGE_UNREACHABLE', 'away', { retryable: true })
    for (const fault of [failing(2, 400), failing(2, 400, passing)]) {
      const storage = directStorage(fault)
      expect(await fetchDirectly(storage)).toStrictEqual(BYTES)
      expect(storage.downloads.map(({ range }) => range.start)).toStrictEqual([0, 300, 300])
    }
  })

  test('is broken off where it stalls, and what hangs writes to memory that nobody uses', async () => {
    const storage = directStorage()
    const get = storage.get.bind(storage)
    let hanging: Uint8Array | undefined
    const streams: ObjectStream[] = []
    storage.get = async (key, options) => {
      const stream = await get(key, options)
      streams.push(stream)
      if (streams.length > 1) {
        const readInto = stream.readInto?.bind(stream)
        stream.readInto = async memory => {
          const length = (await readInto?.(memory)) ?? 0
          hanging?.fill(0xee)
          return length
        }
      } else {
        stream.readInto = memory => {
          hanging = memory
          queueMicrotask(() => vi.advanceTimersByTime(60_000))
          return new Promise(() => undefined)
        }
      }
      return stream
    }
    expect(await fetchDirectly(storage)).toStrictEqual(BYTES)
    expect(streams.map(({ destroyed }) => destroyed)).toStrictEqual([true, true])
  })

  test('that is given up ends with the reason, and its stream is closed', async () => {
    const storage = directStorage()
    const controller = new AbortController()
    const reason = new Error('enough')
    const get = storage.get.bind(storage)
    let stream: ObjectStream | undefined
    storage.get = async (key, options) => {
      stream = await get(key, options)
      stream.readInto = () => {
        setImmediate(() => controller.abort(reason))
        return new Promise(() => undefined)
      }
      return stream
    }
    await expect(fetchDirectly(storage, {}, controller.signal)).rejects.toMatchObject({
      code: 'ABORTED',
      cause: reason,
    })
    expect(stream?.destroyed).toBe(true)
  })
})
