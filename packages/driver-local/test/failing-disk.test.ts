import { readdirSync, truncateSync } from 'node:fs'
import { type FileHandle, mkdir, open, readdir, readFile, unlink } from 'node:fs/promises'
import { constants } from 'node:os'
import { buffer } from 'node:stream/consumers'
import { bytesBody } from '@varve/core'
import { LocalDriver } from '@varve/driver-local'
import { PatternBody, patternBytes, troubledSource } from '@varve/testkit'
import { afterEach, describe, expect, test, vi } from 'vitest'
import { temporaryStorage } from './temporary-storage.ts'

const probe = await open('/dev/null')
const handles: FileHandle = Object.getPrototypeOf(probe)
await probe.close()

afterEach(() => {
  vi.restoreAllMocks()
  vi.useRealTimers()
})

function systemError(name: keyof typeof constants.errno): Error {
  return Object.assign(new Error(`${name}: injected`), { errno: -constants.errno[name], code: name })
}

async function driverOn() {
  const { path } = await temporaryStorage()
  return { path, driver: new LocalDriver({ path }) }
}

describe('a disk that fails', () => {
  test.each(['ENOSPC', 'EDQUOT'] as const)(
    '%s in the middle is STORAGE_FULL and leaves nothing',
    async errno => {
      const { path, driver } = await driverOn()
      const { write } = handles
      let writes = 0
      vi.spyOn(handles, 'write').mockImplementation(function (this: FileHandle, ...args: unknown[]) {
        return ++writes > 5 ? Promise.reject(systemError(errno)) : Reflect.apply(write, this, args)
      })
      const body = new PatternBody({ size: 9_000_000 })
      await expect(driver.put('a/b/object', body)).rejects.toMatchObject({ code: 'STORAGE_FULL' })
      expect(body.faults).toEqual([])
      expect(await readdir(path)).toEqual([])
    },
  )

  test('a write that fails ends the upload at once, though the source gives nothing more', async () => {
    const { path, driver } = await driverOn()
    vi.spyOn(handles, 'write').mockRejectedValue(systemError('EIO'))
    const stalled = troubledSource(
      { kind: 'wait', resumed: new Promise(() => undefined), size: 200_000 },
      { bytes: 100_000 },
    )
    await expect(driver.put('object', stalled)).rejects.toMatchObject({
      code: 'STORAGE_FAILED',
      message: expect.stringContaining('(EIO)'),
    })
    expect(stalled.destroyed).toBe(true)
    expect(await readdir(path)).toEqual([])
  })

  test('an object is whole though each write takes only a part', async () => {
    const { driver } = await driverOn()
    const { write } = handles
    vi.spyOn(handles, 'write').mockImplementation(function (this: FileHandle, ...args: unknown[]) {
      const [chunk, offset, length, position] = args
      return Reflect.apply(write, this, [chunk, offset, Math.ceil(Number(length) / 3), position])
    })
    const body = new PatternBody({ size: 3_000_001, seed: 4, chunkSize: 400_000 })
    await driver.put('object', body)
    expect(body.faults).toEqual([])
    vi.restoreAllMocks()
    expect((await buffer(await driver.get('object'))).equals(patternBytes(4, 0, 3_000_001))).toBe(true)
  })

  test('writes that take nothing fail the upload', async () => {
    const { path, driver } = await driverOn()
    vi.spyOn(handles, 'write').mockResolvedValue({ bytesWritten: 0, buffer: '' })
    await expect(driver.put('object', bytesBody(Buffer.from('x')))).rejects.toMatchObject({
      code: 'STORAGE_FAILED',
    })
    expect(await readdir(path)).toEqual([])
  })

  test('a file whose size is not what was written is no object', async () => {
    const { path, driver } = await driverOn()
    const size = 100_000
    // as a broken disk might; everything is written by then
    const onProgress = () => {
      for (const name of readdirSync(path)) truncateSync(`${path}/${name}`, 10)
    }
    const upload = driver.put('object', bytesBody(Buffer.alloc(size)), { onProgress })
    await expect(upload).rejects.toMatchObject({
      code: 'STORAGE_FAILED',
      message: '100000 bytes were written, but the file has 10. Check the disk or the mount.',
    })
    expect(await readdir(path)).toEqual([])
  })

  test.each(['datasync', 'sync'] as const)(
    'an upload whose %s fails leaves nothing, and the former object where it is not yet replaced',
    async method => {
      const { path, driver } = await driverOn()
      if (method !== 'sync') await driver.put('a/former', bytesBody(Buffer.from('former')))
      vi.spyOn(handles, method).mockRejectedValueOnce(systemError('EIO'))
      const key = method === 'sync' ? 'a/new' : 'a/former'
      await expect(driver.put(key, bytesBody(Buffer.from('new')))).rejects.toMatchObject({
        code: 'STORAGE_FAILED',
      })
      vi.restoreAllMocks()
      if (method === 'sync') return expect(await readdir(path)).toEqual([])
      expect(await readdir(`${path}/a`)).toEqual(['former'])
      expect(await readFile(`${path}/a/former`, 'utf8')).toBe('former')
    },
  )

  test('a file system that has no fsync for folders is no failure', async () => {
    const { driver } = await driverOn()
    vi.spyOn(handles, 'sync').mockRejectedValue(systemError('EINVAL'))
    await driver.put('a/object', bytesBody(Buffer.from('x')))
    expect(await driver.stat('a/object')).toMatchObject({ size: 1 })
  })

  test('the content is durable before the object has its name, and all its folders are before put resolves', async () => {
    const { path, driver } = await driverOn()
    const order: string[] = []
    for (const method of ['datasync', 'sync'] as const) {
      const original = handles[method]
      vi.spyOn(handles, method).mockImplementation(async function (this: FileHandle) {
        const names = await readdir(path, { recursive: true })
        order.push(`${method}, object ${names.includes('a/b/object') ? 'there' : 'not yet there'}`)
        await Reflect.apply(original, this, [])
      })
    }
    await driver.put('a/b/object', bytesBody(Buffer.from('x')))
    expect(order).toEqual([
      'datasync, object not yet there',
      'sync, object there',
      'sync, object there',
      'sync, object there',
    ])
  })

  test('what cannot be removed after a failure is told beside the failure', async () => {
    const { path, driver } = await driverOn()
    vi.spyOn(handles, 'datasync').mockImplementationOnce(async () => {
      for (const name of await readdir(path)) {
        await unlink(`${path}/${name}`)
        await mkdir(`${path}/${name}`) // which unlink does not remove
      }
      throw systemError('ENOSPC')
    })
    await expect(driver.put('object', bytesBody(Buffer.from('x')))).rejects.toMatchObject({
      code: 'STORAGE_FULL',
      message: expect.stringMatching(/disk is full.*Removing what was written so far failed.*EISDIR/),
    })
  })

  test('a read that fails fails the download', async () => {
    const { driver } = await driverOn()
    await driver.put('object', bytesBody(Buffer.alloc(3_000_000)))
    vi.spyOn(handles, 'read').mockRejectedValue(systemError('EIO'))
    await expect(buffer(await driver.get('object'))).rejects.toMatchObject({
      code: 'STORAGE_FAILED',
      message: expect.stringMatching(/^Reading .*object failed: i\/o error \(EIO\)/),
    })
  })
})

describe('a disk that hangs', () => {
  test('an upload can be given up while its content is made durable, and leaves nothing', async () => {
    const { path, driver } = await driverOn()
    const controller = new AbortController()
    const answered = Promise.withResolvers<void>()
    vi.spyOn(handles, 'datasync').mockImplementation(() => {
      controller.abort()
      return answered.promise
    })
    const upload = driver.put('a/b', bytesBody(Buffer.from('x')), { signal: controller.signal })
    await expect(upload).rejects.toMatchObject({ code: 'ABORTED' })
    expect(await readdir(path)).toEqual([])
    answered.resolve()
  })

  test('an upload that is given up just before it is published is not published', async () => {
    const { path, driver } = await driverOn()
    await driver.put('a', bytesBody(Buffer.from('former')))
    const controller = new AbortController()
    vi.spyOn(handles, 'datasync').mockImplementation(async () => {
      setImmediate(() => controller.abort())
    })
    const upload = driver.put('a', bytesBody(Buffer.from('new')), { signal: controller.signal })
    await expect(upload).rejects.toMatchObject({ code: 'ABORTED' })
    expect(await readdir(path)).toEqual(['a'])
    expect(await readFile(`${path}/a`, 'utf8')).toBe('former')
  })

  test('an upload that is given up does not wait for ever for a disk that does not answer', async () => {
    const { driver } = await driverOn()
    vi.useFakeTimers({ toFake: ['setTimeout'] })
    const controller = new AbortController()
    const written = Promise.withResolvers<{ bytesWritten: number; buffer: string }>()
    const writing = new Promise<void>(resolve => {
      vi.spyOn(handles, 'write').mockImplementation(() => {
        resolve()
        return written.promise
      })
    })
    const upload = driver.put('a/b', bytesBody(Buffer.from('x')), { signal: controller.signal })
    const outcome = expect(upload).rejects.toMatchObject({
      code: 'ABORTED',
      message: expect.stringContaining('has not answered for 10 s'),
    })
    await writing
    controller.abort()
    await vi.advanceTimersByTimeAsync(10_000)
    await outcome
    // it answers after all: what is left of the upload is removed then
    written.resolve({ bytesWritten: 1, buffer: '' })
    vi.useRealTimers()
    await vi.waitUntil(async () => (await readdir(driver.location)).length === 0)
  })

  test.each(['get', 'stat', 'delete', 'list', 'check'] as const)(
    '%s can be given up at once',
    async method => {
      const { driver } = await driverOn()
      await driver.put('object', bytesBody(Buffer.from('x')))
      const controller = new AbortController()
      const { signal } = controller
      // the root's own stat is the first thing that every method waits for
      const hanging = new LocalDriver({ path: driver.location, requireMountPoint: true })
      const answered = Promise.withResolvers<never>()
      vi.spyOn(handles, 'stat').mockImplementation(() => {
        controller.abort()
        return answered.promise
      })
      const call = {
        get: () => hanging.get('object', { signal }),
        stat: () => hanging.stat('object', { signal }),
        delete: () => hanging.delete('object', { signal }),
        list: () => hanging.list('', { signal }).next(),
        check: () => hanging.check({ signal }),
      }[method]()
      await expect(call).rejects.toMatchObject({ code: 'ABORTED' })
      answered.reject(systemError('EIO'))
    },
  )
})
