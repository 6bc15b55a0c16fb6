import { buffer } from 'node:stream/consumers'
import type { UploadBody } from '@varve/core'
import { PatternBody, patternBytes } from '@varve/testkit'
import { expect, test } from 'vitest'
import { FakeServer } from './fake-server.ts'

const SIZE = 5_000_000

test('an upload to a server that tells no limits is whole, in packets that every server takes', async () => {
  const { server, driver } = await FakeServer.begin()
  const body = new PatternBody({ size: SIZE, seed: 1 })
  await driver.put('a/object', body)
  expect(server.files.get('/a/object')?.equals(patternBytes(1, 0, SIZE))).toBe(true)
  expect(body.faults).toEqual([])
  expect(Math.max(...server.writes)).toBeLessThanOrEqual(32 * 1024)
  expect((await buffer(await driver.get('a/object'))).equals(patternBytes(1, 0, SIZE))).toBe(true)
})

test.each([1, 2])('a folder of which a server tells %d names at once is listed to its end', async names => {
  const { server, driver } = await FakeServer.begin()
  server.namesAtOnce = names
  const keys = ['a/b/1', 'a/b/2', 'a/c/1', 'a/d']
  for (const key of keys) await driver.put(key, new PatternBody({ size: 1 }))
  const listed: string[] = []
  for await (const { key } of driver.list('a/')) listed.push(key)
  expect(listed.sort()).toEqual(keys)
})

test('memory is given back when the server has all that was in it, and is used again', async () => {
  const { server, driver } = await FakeServer.begin()
  const bytes = patternBytes(2, 0, SIZE)
  const body = new PatternBody({ size: SIZE, seed: 2, chunkSize: 100_000 })
  let given = 0
  let early = 0
  const watched: UploadBody = {
    size: SIZE,
    replayable: true,
    open: range => body.open(range),
    recycle(chunk) {
      const [stored] = server.files.values()
      const range = [given, given + chunk.byteLength] as const
      given += chunk.byteLength
      if (!stored?.subarray(...range).equals(bytes.subarray(...range))) early++
      body.recycle(chunk)
    },
  }
  await driver.put('a', watched)
  expect(early).toBe(0)
  expect(given).toBe(SIZE)
  expect(body.faults).toEqual([])
  expect(body.allocations).toBeLessThan(SIZE / 100_000)
})
