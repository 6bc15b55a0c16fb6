import { once } from 'node:events'
import { mkdir, readdir, rmdir, truncate, unlink, utimes, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { buffer } from 'node:stream/consumers'
import { bytesBody, type ObjectStream } from '@varve/core'
import { LocalDriver } from '@varve/driver-local'
import { PatternBody, troubledSource } from '@varve/testkit'
import { describe, expect, test, vi } from 'vitest'
import { Folder } from '../src/folder.ts'
import { walkFiles } from '../src/walk-files.ts'
import { temporaryStorage } from './temporary-storage.ts'

async function driverOn() {
  const { path } = await temporaryStorage()
  return { path, driver: new LocalDriver({ path }) }
}

describe('what killed uploads left', () => {
  test('is removed by its age, with the folders that it kept', async () => {
    const { path, driver } = await driverOn()
    const now = Date.now()
    const leave = async (name: string, ageMs: number) => {
      await writeFile(`${path}/${name}`, 'half')
      const time = new Date(now - ageMs)
      await utimes(`${path}/${name}`, time, time)
    }
    const day = 24 * 3_600_000
    await mkdir(`${path}/old/only`, { recursive: true })
    await mkdir(`${path}/kept`)
    await leave('old/only/.varve-part-1', 2 * day)
    await leave('.varve-part-2', 2 * day)
    await leave('kept/.varve-part-3', 2 * day)
    await leave('kept/.varve-part-4', day / 2)
    await leave('kept/object', 9 * day)
    expect(await driver.cleanUp({ olderThan: new Date(now - day) })).toBe(3)
    expect((await readdir(path, { recursive: true })).sort()).toEqual([
      'kept',
      'kept/.varve-part-4',
      'kept/object',
    ])
    expect(await driver.cleanUp({ olderThan: new Date(now - day) })).toBe(0)
  })

  test('an upload whose file was taken away fails', async () => {
    const { path, driver } = await driverOn()
    const taken = Promise.withResolvers<void>()
    const resumed = Promise.withResolvers<void>()
    const source = troubledSource(
      { kind: 'wait', resumed: resumed.promise, size: 400_000 },
      { bytes: 200_000, onTaken: taken.resolve },
    )
    const upload = driver.put('object', source)
    await taken.promise
    for (const name of await readdir(path)) await unlink(`${path}/${name}`)
    resumed.resolve()
    await expect(upload).rejects.toMatchObject({ code: 'STORAGE_FAILED' })
    expect(await readdir(path)).toEqual([])
  })
})

test.each([1, 300_000])('an onProgress that throws at byte %d fails the upload with that', async least => {
  const { path, driver } = await driverOn()
  const boom = new Error('boom')
  const onProgress = (bytes: number) => {
    if (bytes >= least) throw boom
  }
  const body = new PatternBody({ size: 300_000 })
  await expect(driver.put('a/b', body, { onProgress })).rejects.toBe(boom)
  expect(await readdir(path)).toEqual([])
})

test('an upload of any size needs the memory of a few chunks', async () => {
  const { driver } = await driverOn()
  const body = new PatternBody({ size: 10_000_000, chunkSize: 50_000 })
  await driver.put('object', body)
  expect(body.faults).toEqual([])
  expect(body.allocations).toBeLessThanOrEqual(6)
})

test('a folder that was removed when it is read is empty, and ends no listing', async () => {
  const { path } = await temporaryStorage()
  await mkdir(`${path}/gone`)
  await using root = await Folder.open(path)
  await using gone = await root.enter('gone')
  await rmdir(`${path}/gone`)
  const every = { base: '', enters: () => true, takes: () => true }
  for await (const file of walkFiles(gone, every)) expect.unreachable(file.path)
})

test('no file stays open, whatever comes of the calls', async () => {
  const { path, driver } = await driverOn()
  const openFiles = async () => (await readdir('/proc/self/fd')).length
  await driver.put('warm/up', bytesBody(Buffer.from('x')))
  const before = await openFiles()
  const fails = troubledSource({ kind: 'fail', error: new Error('boom') }, { bytes: 300_000 })
  for (let turn = 0; turn < 5; turn++) {
    await driver.put('a/b/c', bytesBody(Buffer.alloc(3_000_000)))
    await buffer(await driver.get('a/b/c'))
    const left = await driver.get('a/b/c')
    left.destroy()
    for await (const _ of driver.list('')) break
    await driver.stat('a/none/c')
    await driver.get('a/b/none').catch(() => undefined)
    await driver.get('a/b').catch(() => undefined)
    await driver.put('a/b/d', fails).catch(() => undefined)
    await driver.put('a/b/c/below', bytesBody(Buffer.from('x'))).catch(() => undefined)
    await driver.put('a/b', bytesBody(Buffer.from('x'))).catch(() => undefined)
    await driver
      .put('a/e', bytesBody(Buffer.from('x')), { signal: AbortSignal.abort() })
      .catch(() => undefined)
    await driver.check()
    await driver.cleanUp({ olderThan: new Date() })
    await driver.delete('a/b/c')
    const marked = new LocalDriver({ path, marker: 'none' })
    await marked.stat('x').catch(() => undefined)
  }
  await vi.waitFor(async () => expect(await openFiles()).toBeLessThanOrEqual(before))
})

describe('memory of a download', () => {
  test('that is given back is used again, and no byte that still waits is overwritten', async () => {
    const { driver } = await driverOn()
    const body = new PatternBody({ seed: 7, size: 20 * 1024 * 1024 + 11 })
    await driver.put('object', body)
    const expected = await buffer(body.open())
    const stream: ObjectStream = await driver.get('object')
    const memory = new Set<ArrayBufferLike>()
    let position = 0
    let held: Uint8Array = new Uint8Array(0)
    // Each chunk is looked at once the next one is there: its memory must not have been lent again.
    const finish = () => {
      expect(expected.subarray(position, position + held.length).equals(held)).toBe(true)
      position += held.length
      stream.recycle?.(held)
      stream.recycle?.(held) // twice is once
    }
    for await (const chunk of stream) {
      finish()
      held = chunk
      memory.add(chunk.buffer)
    }
    finish()
    expect(position).toBe(expected.length)
    expect(memory.size).toBeLessThanOrEqual(4)
  })
})

test('a download right into memory ends with the error of a file that was cut short, and after it was given up', async () => {
  const { driver, path } = await driverOn()
  await driver.put('object', bytesBody(Buffer.alloc(3_000_000, 7)))
  const cut: ObjectStream = await driver.get('object')
  await truncate(join(path, 'object'), 1_500_000)
  const memory = Buffer.alloc(1_000_000)
  expect(await cut.readInto?.(memory)).toBe(1_000_000)
  expect(await cut.readInto?.(memory)).toBe(500_000)
  await expect(cut.readInto?.(memory)).rejects.toMatchObject({
    code: 'STORAGE_FAILED',
    context: { position: 1_500_000, end: 3_000_000 },
  })
  cut.destroy()
  await once(cut, 'close')
  await expect(cut.readInto?.(memory)).rejects.toMatchObject({ code: 'STORAGE_FAILED' })
})
