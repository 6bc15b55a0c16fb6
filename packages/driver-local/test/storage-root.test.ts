import { mkdir, readdir, rm, stat, symlink, writeFile } from 'node:fs/promises'
import { bytesBody, type StorageDriver } from '@varve/core'
import { LocalDriver } from '@varve/driver-local'
import { describe, expect, test } from 'vitest'
import { temporaryStorage } from './temporary-storage.ts'

const bytes = Buffer.from('x')

/** Every method, none of which may do anything in a folder that is not the storage. */
function everyCall(driver: StorageDriver): [string, () => Promise<unknown>][] {
  return [
    ['put', () => driver.put('key', bytesBody(bytes))],
    ['get', () => driver.get('key')],
    ['stat', () => driver.stat('key')],
    ['list', async () => driver.list('')[Symbol.asyncIterator]().next()],
    ['delete', () => driver.delete('key')],
    ['cleanUp', async () => driver.cleanUp?.({ olderThan: new Date() })],
  ]
}

async function expectRefusal(driver: StorageDriver, code: string, message: string): Promise<void> {
  for (const [name, call] of everyCall(driver)) {
    await expect(call(), name).rejects.toMatchObject({ code, message: expect.stringContaining(message) })
  }
  const { ok, checks } = await driver.check()
  expect(ok).toBe(false)
  expect(checks).toEqual([{ name: 'connect', ok: false, code, message: expect.stringContaining(message) }])
}

describe('the options of a LocalDriver', () => {
  test.each(['backups', './backups', '', '~/backups', 'C:\\backups', '/nul\0byte'])(
    'the path %j is refused, with the path in the message',
    path => {
      expect(() => new LocalDriver({ path })).toThrow(
        expect.objectContaining({
          code: 'INVALID_CONFIG',
          message: expect.stringContaining(`path of a local storage cannot be ${JSON.stringify(path)}`),
        }),
      )
    },
  )

  test.each(['', 'a/b', '..', '../marker', '/marker'])('the marker %j is refused', marker => {
    expect(() => new LocalDriver({ path: '/mnt', marker })).toThrow(
      expect.objectContaining({ code: 'INVALID_CONFIG', message: expect.stringContaining('marker') }),
    )
  })

  test('making the folder and proving that it was there exclude each other', () => {
    const refused = expect.objectContaining({ code: 'INVALID_CONFIG' })
    expect(() => new LocalDriver({ path: '/mnt', create: true, requireMountPoint: true })).toThrow(refused)
    expect(() => new LocalDriver({ path: '/mnt', create: true, marker: 'm' })).toThrow(refused)
  })

  test('the location is the path, without superfluous slashes', () => {
    expect(new LocalDriver({ path: '/mnt//backup/./a/' }).location).toBe('/mnt/backup/a/')
  })
})

describe('the folder of a LocalDriver', () => {
  test('one that is missing is named by every method, and not made', async () => {
    const { path } = await temporaryStorage()
    const missing = `${path}/missing`
    await expectRefusal(new LocalDriver({ path: missing }), 'STORAGE_NOT_FOUND', missing)
    expect(await readdir(path)).toEqual([])
  })

  test('a file in its place is no folder', async () => {
    const { path } = await temporaryStorage()
    await writeFile(`${path}/file`, 'x')
    await expectRefusal(new LocalDriver({ path: `${path}/file` }), 'STORAGE_NOT_FOUND', `${path}/file`)
  })

  test('with `create` it is made, with its parents, for its owner only', async () => {
    const { path } = await temporaryStorage()
    const driver = new LocalDriver({ path: `${path}/made/here`, create: true })
    await driver.put('key', bytesBody(bytes))
    await driver.put('key', bytesBody(bytes))
    expect((await stat(`${path}/made/here/key`)).isFile()).toBe(true)
    expect((await stat(`${path}/made/here`)).mode & 0o777).toBe(0o700)
  })

  test('a symbolic link of the configuration is followed', async () => {
    const { path, outside } = await temporaryStorage()
    await symlink(outside, `${path}/link`)
    await new LocalDriver({ path: `${path}/link` }).put('key', bytesBody(bytes))
    expect(await readdir(outside)).toEqual(['key'])
  })

  test('one that is no mount point is refused by every method where it must be one', async () => {
    const { path } = await temporaryStorage()
    await writeFile(`${path}/key`, 'x')
    const driver = new LocalDriver({ path, requireMountPoint: true })
    await expectRefusal(driver, 'STORAGE_NOT_MOUNTED', `${path} does not hold the storage`)
    expect(await readdir(path)).toEqual(['key'])
  })

  test.each(['/', '/proc'])('%s is a mount point', async path => {
    const driver = new LocalDriver({ path, requireMountPoint: true })
    expect(await driver.stat('no-such-file-in-here')).toBeUndefined()
  })

  test('one without its marker is refused by every method, also when the marker vanishes later', async () => {
    const { path } = await temporaryStorage()
    const marker = '.varve-storage'
    const driver = new LocalDriver({ path, marker })
    await expectRefusal(driver, 'STORAGE_NOT_MOUNTED', `the file ${marker} is not in it`)
    expect(await readdir(path)).toEqual([])

    await writeFile(`${path}/${marker}`, '')
    await driver.put('key', bytesBody(bytes))
    expect(await driver.check()).toMatchObject({ ok: true })

    await rm(`${path}/${marker}`)
    await expectRefusal(driver, 'STORAGE_NOT_MOUNTED', `the file ${marker} is not in it`)
    expect(await readdir(path)).toEqual(['key'])
  })

  test('the marker is no object', async () => {
    const { path } = await temporaryStorage()
    await writeFile(`${path}/marker`, 'as it was')
    const driver = new LocalDriver({ path, marker: 'marker' })
    const refused = { code: 'INVALID_KEY' }
    await expect(driver.put('marker', bytesBody(bytes))).rejects.toMatchObject(refused)
    await expect(driver.get('marker')).rejects.toMatchObject(refused)
    await expect(driver.stat('marker')).rejects.toMatchObject(refused)
    await expect(driver.delete('marker')).rejects.toMatchObject(refused)
    await driver.put('folder/marker', bytesBody(bytes))
    const keys: string[] = []
    for await (const { key } of driver.list('')) keys.push(key)
    expect(keys).toEqual(['folder/marker'])
    expect((await stat(`${path}/marker`)).size).toBe(9)
  })

  test('a folder that is there empties, but stays', async () => {
    const { path } = await temporaryStorage()
    await mkdir(`${path}/a/kept`, { recursive: true })
    const driver = new LocalDriver({ path })
    await driver.put('a/b/c/d', bytesBody(bytes))
    await driver.delete('a/b/c/d')
    expect(await readdir(path, { recursive: true })).toEqual(['a', 'a/kept'])
    await driver.put('e', bytesBody(bytes))
    await driver.delete('e')
    await driver.put('a/kept/f', bytesBody(bytes))
    await driver.delete('a/kept/f')
    expect(await readdir(path)).toEqual([])
  })
})
