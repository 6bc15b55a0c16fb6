import { Readable } from 'node:stream'
import { buffer } from 'node:stream/consumers'
import { bytesBody, type StorageDriver, VarveError } from '@varve/core'
import { describeDriver, type Fault, FaultyDriver, PatternBody, patternBytes } from '@varve/testkit'
import { describe, expect, test } from 'vitest'
import { MemoryDriver } from '../../../examples/custom-driver/memory-driver.ts'

const SIZE = 200_000
const bytes = patternBytes(1, 0, SIZE)
const error = new VarveError('STORAGE_FULL', 'The disk is full.')

async function withObject(on: 'put' | 'get' | 'stat' | 'list' | 'delete', fault: Fault) {
  const memory = new MemoryDriver()
  await memory.put('object', bytesBody(bytes))
  return { memory, storage: new FaultyDriver(memory, [{ on, fault }]) }
}

function flipped(offset: number, bit: number): Buffer {
  const copy = Buffer.from(bytes)
  copy[offset] = (copy[offset] ?? 0) ^ (1 << bit)
  return copy
}

describeDriver('A FaultyDriver without faults', {
  capabilities: { rangeRead: true, atomicPublish: true, resume: false, parallelParts: false },
  async create() {
    const memory = new MemoryDriver()
    return {
      driver: new FaultyDriver(memory, []),
      inspect: async () => Array.from(memory.objects, ([name, { bytes }]) => ({ name, size: bytes.length })),
      readRaw: async name => memory.objects.get(name)?.bytes ?? new Uint8Array(),
      dispose: () => memory[Symbol.asyncDispose](),
    }
  },
  largeSize: 1_000_003,
  manyObjects: 50,
})

describe('FaultyDriver', () => {
  test('without a fault everything passes', async () => {
    const memory = new MemoryDriver()
    const storage = new FaultyDriver(memory, [])
    const body = new PatternBody({ size: SIZE, seed: 1 })
    expect(await storage.put('object', body)).toMatchObject({ key: 'object', size: SIZE })
    expect(body.faults).toEqual([])
    expect((await buffer(await storage.get('object'))).equals(bytes)).toBe(true)
    expect(await storage.stat('object')).toMatchObject({ size: SIZE })
    expect(await storage.list('').next()).toMatchObject({ value: { key: 'object', size: SIZE } })
    expect(await storage.check()).toMatchObject({ ok: true })
    await storage.delete('object')
    expect(memory.objects.size).toBe(0)
  })

  test('a call that fails before has no effect; one that fails after has it', async () => {
    const before = await withObject('delete', { kind: 'fail-before', error })
    await expect(before.storage.delete('object')).rejects.toBe(error)
    expect(before.memory.objects.size).toBe(1)
    const after = await withObject('delete', { kind: 'fail-after', error })
    await expect(after.storage.delete('object')).rejects.toBe(error)
    expect(after.memory.objects.size).toBe(0)
  })

  test('a listing fails before or after its objects', async () => {
    const before = await withObject('list', { kind: 'fail-before', error })
    await expect(before.storage.list('').next()).rejects.toBe(error)
    const after = await withObject('list', { kind: 'fail-after', error })
    const list = after.storage.list('')
    expect(await list.next()).toMatchObject({ value: { key: 'object' } })
    await expect(list.next()).rejects.toBe(error)
  })

  test.each(['put', 'get', 'stat', 'list', 'delete'] as const)(
    'a %s that stalls does nothing until it is given up',
    async on => {
      const { memory, storage } = await withObject(on, { kind: 'stall' })
      const controller = new AbortController()
      const { signal } = controller
      const call = {
        put: () => storage.put('new', bytesBody(bytes), { signal }),
        get: () => storage.get('object', { signal }),
        stat: () => storage.stat('object', { signal }),
        list: () => storage.list('', { signal }).next(),
        delete: () => storage.delete('object', { signal }),
      }[on]()
      let settled = false
      const outcome = call.finally(() => {
        settled = true
      })
      await new Promise(resolve => setImmediate(resolve))
      expect(settled).toBe(false)
      controller.abort()
      await expect(outcome).rejects.toMatchObject({ code: 'ABORTED' })
      expect([...memory.objects.keys()]).toEqual(['object'])
    },
  )

  test.each<[string, Fault, Buffer]>([
    ['a flipped bit', { kind: 'flip-bit', offset: 70_000, bit: 3 }, flipped(70_000, 3)],
    ['a flipped first bit', { kind: 'flip-bit', offset: 0 }, flipped(0, 0)],
    ['a lost end', { kind: 'end-at', offset: 70_001 }, bytes.subarray(0, 70_001)],
    ['bytes too many', { kind: 'append', bytes: 5 }, Buffer.concat([bytes, Buffer.alloc(5)])],
  ])('%s is stored by an upload, or read by a download', async (_, fault, expected) => {
    const { memory } = await withObject('put', fault)
    const uploading = new FaultyDriver(memory, [{ on: 'put', fault }])
    await uploading.put('damaged', bytesBody(bytes))
    expect(memory.objects.get('damaged')?.bytes.equals(expected)).toBe(true)
    const downloading = new FaultyDriver(memory, [{ on: 'get', fault }])
    expect((await buffer(await downloading.get('object'))).equals(expected)).toBe(true)
    expect(memory.objects.get('object')?.bytes.equals(bytes)).toBe(true)
  })

  test('a flipped bit is at its place in the object, also when a range is read', async () => {
    const { storage } = await withObject('get', { kind: 'flip-bit', offset: 70_000 })
    const range = { start: 69_990, end: 70_010 }
    expect(await buffer(await storage.get('object', { range }))).toEqual(
      flipped(70_000, 0).subarray(range.start, range.end),
    )
    expect(await buffer(await storage.get('object', { range: { start: 0, end: 100 } }))).toEqual(
      bytes.subarray(0, 100),
    )
  })

  test.each([0, 100_000, SIZE])('an upload that breaks at byte %d fails and stores nothing', async offset => {
    const { memory, storage } = await withObject('put', { kind: 'fail-at', offset, error })
    const source = Readable.from([bytes])
    await expect(storage.put('new', source)).rejects.toBe(error)
    expect(source.destroyed).toBe(true)
    expect([...memory.objects.keys()]).toEqual(['object'])
  })

  test('a download that breaks gives its bytes up to there, and then the error', async () => {
    const { storage } = await withObject('get', { kind: 'fail-at', offset: 100_000, error })
    const download = await storage.get('object')
    let count = 0
    download.on('data', chunk => {
      count += chunk.byteLength
    })
    await expect(
      new Promise((resolve, reject) => download.on('error', reject).on('end', resolve)),
    ).rejects.toBe(error)
    expect(count).toBe(100_000)
  })

  test('a download that stalls can be given up', async () => {
    const { storage } = await withObject('get', { kind: 'stall-at', offset: 100_000 })
    const controller = new AbortController()
    const download = await storage.get('object', { signal: controller.signal })
    let count = 0
    download.on('data', chunk => {
      count += chunk.byteLength
      if (count === 100_000) controller.abort()
    })
    await expect(
      new Promise((resolve, reject) => download.on('error', reject).on('end', resolve)),
    ).rejects.toMatchObject({ code: 'ABORTED' })
  })

  test('a wrong size is told by stat and by list', async () => {
    const stat = await withObject('stat', { kind: 'resize', by: -1 })
    expect(await stat.storage.stat('object')).toMatchObject({ size: SIZE - 1 })
    const list = await withObject('list', { kind: 'resize', by: 9 })
    expect(await list.storage.list('').next()).toMatchObject({ value: { size: SIZE + 9 } })
  })

  test('a listing that lags does not know the last changes', async () => {
    const memory = new MemoryDriver()
    let changes = 0
    const storage = new FaultyDriver(memory, ({ operation }) =>
      operation === 'list' ? { kind: 'stale', changes } : undefined,
    )
    const keys = async (known: number, prefix = '') => {
      changes = known
      const found: string[] = []
      for await (const { key, size } of storage.list(prefix)) found.push(`${key} ${size}`)
      return found.sort()
    }
    await storage.put('a', bytesBody(new Uint8Array(1)))
    await storage.put('b', bytesBody(new Uint8Array(2)))
    await storage.put('b', bytesBody(new Uint8Array(3)))
    await storage.delete('a')
    await storage.delete('never')
    expect(await keys(0)).toEqual(['b 3'])
    expect(await keys(1)).toEqual(['b 3'])
    expect(await keys(2)).toEqual(['a 1', 'b 3'])
    expect(await keys(2, 'b')).toEqual(['b 3'])
    expect(await keys(3)).toEqual(['a 1', 'b 2'])
    expect(await keys(4)).toEqual(['a 1'])
    expect(await keys(Number.POSITIVE_INFINITY)).toEqual([])
    expect(await storage.stat('b')).toMatchObject({ size: 3 }) // only listings lag
  })

  test('an answer that comes late comes after its effect, and fails where the call was given up', async () => {
    const memory = new MemoryDriver()
    const late = (ms: number) => new FaultyDriver(memory, () => ({ kind: 'late', ms }))
    expect(await late(1).put('object', bytesBody(bytes))).toMatchObject({ size: SIZE })
    const giveUp = new AbortController()
    const deleted = late(1e6).delete('object', { signal: giveUp.signal })
    const outcome = expect(deleted).rejects.toMatchObject({ code: 'ABORTED' })
    while (memory.objects.size > 0) await new Promise(resolve => setImmediate(resolve))
    giveUp.abort()
    await outcome
  })

  test('a rule counts the calls that match it', async () => {
    const storage = new FaultyDriver(new MemoryDriver(), [
      { on: 'put', key: /\.qcow2$/, call: 2, fault: { kind: 'fail-before', error } },
      { on: 'put', key: 'named', fault: { kind: 'fail-before', error } },
    ])
    const put = (key: string) => storage.put(key, bytesBody(bytes))
    await put('a.qcow2')
    await put('a.xml')
    await expect(put('b.qcow2')).rejects.toBe(error)
    await put('c.qcow2')
    await expect(put('named')).rejects.toBe(error)
    await expect(put('named')).rejects.toBe(error)
    expect(storage.calls.map(call => call.key)).toEqual([
      'a.qcow2',
      'a.xml',
      'b.qcow2',
      'c.qcow2',
      'named',
      'named',
    ])
  })

  test('faults are combined by one driver in front of another', async () => {
    const memory = new MemoryDriver()
    await memory.put('object', bytesBody(bytes))
    const inner = new FaultyDriver(memory, [{ on: 'get', fault: { kind: 'flip-bit', offset: 0 } }])
    const outer = new FaultyDriver(inner, [{ on: 'get', fault: { kind: 'end-at', offset: 10 } }])
    expect(await buffer(await outer.get('object'))).toEqual(flipped(0, 0).subarray(0, 10))
  })

  test('cleanUp is there where the driver behind has it, and can fail as well', async () => {
    const memory: StorageDriver = new MemoryDriver()
    expect(new FaultyDriver(memory, []).cleanUp).toBeUndefined()
    memory.cleanUp = async () => 3
    const olderThan = new Date()
    expect(await new FaultyDriver(memory, []).cleanUp?.({ olderThan })).toBe(3)
    const failing = new FaultyDriver(memory, [{ on: 'cleanUp', fault: { kind: 'fail-after', error } }])
    await expect(failing.cleanUp?.({ olderThan })).rejects.toBe(error)
  })
})
