import { once } from 'node:events'
import type { ByteRange, ObjectStream, StorageDriver } from '@varve/core'
import { describe, expect, test } from 'vitest'
import { anotherError, begin, bytesOf, type Contract, errorOf, place, read } from './contract-target.ts'
import { patternBytes } from './pattern.ts'
import { PatternBody } from './pattern-body.ts'

const SIZE = 2_500_000

/** Whole objects and ranges of them. */
export function describeReading(contract: Contract): void {
  describe('reading', () => {
    test('any range of an object can be read, cut off at its end', async () => {
      const target = await begin(contract.create)
      const { driver } = target
      const bytes = patternBytes(1, 0, SIZE)
      await place(target, 'object', bytes)
      const ranges: [string, number, number][] = [
        ['the first byte', 0, 1],
        ['a middle', 1_000_001, 1_300_003],
        ['the last byte', SIZE - 1, SIZE],
        ['over the end', SIZE - 10, SIZE + 10],
        ['past the end', SIZE + 5, SIZE + 10],
        ['nothing in the middle', 7, 7],
      ]
      const further: [string, number, number][] = [
        ['a beginning', 0, 1000],
        ['a chunk border', 1_048_575, 1_048_577],
        ['an end', SIZE - 1000, SIZE],
        ['all', 0, SIZE],
        ['more than all', 0, SIZE + 1000],
        ['from the end on', SIZE, SIZE + 10],
        ['nothing at the beginning', 0, 0],
        ['nothing at the end', SIZE, SIZE],
        ['far over the end', 1_000_000, Number.MAX_SAFE_INTEGER],
      ]
      if (!contract.brief) ranges.push(...further)
      const tryRange = async ([name, start, end]: (typeof ranges)[number]) => {
        const part = await read(driver, 'object', { start, end })
        expect(part.byteLength, name).toBe(Math.max(0, Math.min(end, SIZE) - Math.min(start, SIZE)))
        expect(part.equals(bytes.subarray(start, end)), name).toBe(true)
        if (!direct) return
        const same = (await readDirectly(driver, { start, end })).equals(part)
        expect(same, `${name}, right into memory`).toBe(true)
      }
      const first: ObjectStream = await driver.get('object')
      const direct = first.readInto !== undefined
      first.destroy()
      await Promise.all(ranges.map(tryRange))
    })

    test('any range of an empty object is empty', async () => {
      const target = await begin(contract.create)
      const { driver } = target
      await place(target, 'empty', new Uint8Array())
      for (const start of [0, 5]) {
        expect(await read(driver, 'empty', { start, end: 10 }), `from ${start}`).toHaveLength(0)
        expect(await read(driver, 'empty', { start, end: start }), `nothing at ${start}`).toHaveLength(0)
      }
    })

    test('ranges that are none are refused', async () => {
      const target = await begin(contract.create)
      const { driver } = target
      await place(target, 'object', Buffer.from('0123456789'))
      const ranges = [
        [-1, 5],
        [5, 4],
        [0.5, 3],
        [0, Number.NaN],
        [0, Number.POSITIVE_INFINITY],
      ] as const
      for (const [start, end] of ranges) {
        const part = driver.get('object', { range: { start, end } })
        await expect(part, `${start} to ${end}`).rejects.toMatchObject(errorOf('INVALID_ARGUMENT'))
      }
    })

    test('many ranges are read beside each other', async () => {
      const target = await begin(contract.create)
      const { driver } = target
      const count = contract.brief ? 4 : 16
      const body = new PatternBody({ size: count * 500_000, seed: 8 })
      await place(target, 'object', body)
      const starts = Array.from({ length: count }, (_, index) => index * 500_000)
      const parts = await Promise.all(
        starts.map(start => read(driver, 'object', { start, end: start + 500_000 })),
      )
      expect(Buffer.concat(parts).equals(bytesOf(body))).toBe(true)
    })

    test('a download can be given up before it begins', async () => {
      const target = await begin(contract.create)
      const { driver } = target
      await place(target, 'object', Buffer.from('x'))
      const download = driver.get('object', { signal: AbortSignal.abort(anotherError) })
      await expect(download).rejects.toMatchObject({ ...errorOf('ABORTED'), cause: anotherError })
    })

    test('a download that is given up fails with ABORTED', async () => {
      const target = await begin(contract.create)
      const { driver } = target
      await place(target, 'large', { size: contract.largeSize, seed: 0 })
      const controller = new AbortController()
      const download = await driver.get('large', { signal: controller.signal })
      await once(download, 'readable')
      const failure = once(download, 'close').catch(error => error)
      controller.abort(anotherError)
      expect(await failure).toMatchObject(errorOf('ABORTED'))
    })

    test('a download that has come and is not read yet can be given up', async () => {
      const target = await begin(contract.create)
      const { driver } = target
      await place(target, 'small', Buffer.from('x'))
      const controller = new AbortController()
      const download = await driver.get('small', { signal: controller.signal })
      await once(download, 'readable')
      await driver.stat('small') // while its end comes as well
      const failure = once(download, 'close').catch(error => error)
      controller.abort(anotherError)
      expect(await failure).toMatchObject(errorOf('ABORTED'))
    })

    test('downloads that are left half-way hold nothing up', async () => {
      const target = await begin(contract.create)
      const { driver } = target
      const body = new PatternBody({ size: 4_000_000, seed: 9 })
      await place(target, 'object', body)
      for (let turn = 0; turn < contract.turns; turn++) {
        const download = await driver.get('object')
        if (turn % 2 === 0) await once(download, 'readable')
        download.destroy()
      }
      expect((await read(driver, 'object')).equals(bytesOf(body))).toBe(true)
    })
  })
}

/** The range of `object` by `readInto`, into memory of a size that fits nothing. */
async function readDirectly(driver: StorageDriver, range: ByteRange): Promise<Buffer> {
  const stream: ObjectStream = await driver.get('object', { range })
  try {
    if (!stream.readInto) expect.unreachable('a stream of the object has no readInto, and another one has')
    const parts: Buffer[] = []
    for (;;) {
      const memory = Buffer.alloc(777_777, 0xee)
      const length = await stream.readInto(memory)
      expect(memory.subarray(length).every(byte => byte === 0xee)).toBe(true)
      if (length === 0) return Buffer.concat(parts)
      parts.push(memory.subarray(0, length))
    }
  } finally {
    stream.destroy()
  }
}
