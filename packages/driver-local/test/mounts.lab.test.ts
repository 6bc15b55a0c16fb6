import { execFileSync, spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdir, mkdtemp, readdir, rm, truncate, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { buffer } from 'node:stream/consumers'
import { bytesBody } from '@varve/core'
import { LocalDriver } from '@varve/driver-local'
import { mountTmpfs, type Tmpfs } from '@varve/testkit/lab'
import { expect, onTestFinished, test } from 'vitest'

const MIB = 1024 * 1024
const bytes = Buffer.from('x')

async function mounted(options = ''): Promise<Tmpfs> {
  const disk = await mountTmpfs(`size=${8 * MIB}${options}`)
  onTestFinished(() => disk.dispose())
  return disk
}

test('a mount point that is needed is found, and nothing is written once it is gone', async () => {
  const disk = await mounted()
  const driver = new LocalDriver({ path: disk.path, requireMountPoint: true })
  await driver.put('a/object', bytesBody(bytes))
  expect(await driver.check()).toMatchObject({ ok: true })

  disk.unmount()
  await expect(driver.put('a/object', bytesBody(bytes))).rejects.toMatchObject({
    code: 'STORAGE_NOT_MOUNTED',
  })
  await expect(driver.stat('a/object')).rejects.toMatchObject({ code: 'STORAGE_NOT_MOUNTED' })
  expect(await driver.check()).toMatchObject({ ok: false, checks: [{ name: 'connect', ok: false }] })
  expect(await readdir(disk.path)).toEqual([])
})

test('a folder below a mount point is none itself, but may hold a marker', async () => {
  const disk = await mounted()
  await new LocalDriver({ path: `${disk.path}/below`, create: true }).put('key', bytesBody(bytes))
  const path = `${disk.path}/below`
  const strict = new LocalDriver({ path, requireMountPoint: true })
  await expect(strict.stat('key')).rejects.toMatchObject({ code: 'STORAGE_NOT_MOUNTED' })
  await writeFile(`${path}/.varve-storage`, '')
  expect(await new LocalDriver({ path, marker: '.varve-storage' }).stat('key')).toMatchObject({ size: 1 })
})

test('the free bytes are those of the file system', async () => {
  const disk = await mounted()
  const driver = new LocalDriver({ path: disk.path })
  expect(await driver.check()).toMatchObject({ freeBytes: 8 * MIB })
  await driver.put('object', bytesBody(Buffer.alloc(3 * MIB)))
  expect(await driver.check()).toMatchObject({ freeBytes: 5 * MIB })
})

test('a full disk says at the check that nothing can be written', async () => {
  const disk = await mounted()
  await writeFile(`${disk.path}/fill`, Buffer.alloc(8 * MIB))
  const { ok, checks } = await new LocalDriver({ path: disk.path }).check()
  expect(ok).toBe(false)
  expect(checks).toEqual([
    { name: 'connect', ok: true },
    { name: 'write', ok: false, code: 'STORAGE_FULL', message: expect.stringContaining('disk is full') },
  ])
  expect(await readdir(disk.path)).toEqual(['fill'])
})

test('an upload for which there are not enough inodes leaves no folder', async () => {
  const disk = await mounted(',nr_inodes=3') // one for the root
  const driver = new LocalDriver({ path: disk.path })
  const full = { code: 'STORAGE_FULL' }
  await expect(driver.put('a/b/c/d/object', bytesBody(bytes))).rejects.toMatchObject(full)
  await expect(driver.put('a/b/object', bytesBody(bytes))).rejects.toMatchObject(full)
  expect(await readdir(disk.path)).toEqual([])
  await driver.put('a/object', bytesBody(bytes))
})

test('a read-only mount denies writing and deleting, says so at the check, and can be read', async () => {
  const disk = await mounted()
  const driver = new LocalDriver({ path: disk.path })
  await driver.put('a/object', bytesBody(bytes))
  disk.remount('ro')
  const denied = {
    code: 'STORAGE_ACCESS_DENIED',
    message: expect.stringContaining('read-only file system (EROFS)'),
  }
  await expect(driver.put('a/object', bytesBody(bytes))).rejects.toMatchObject(denied)
  await expect(driver.put('b/object', bytesBody(bytes))).rejects.toMatchObject(denied)
  await expect(driver.delete('a/object')).rejects.toMatchObject(denied)
  expect(await driver.check()).toMatchObject({
    ok: false,
    checks: [
      { name: 'connect', ok: true },
      { name: 'write', ok: false },
    ],
  })
  expect(await buffer(await driver.get('a/object'))).toEqual(bytes)
})

/** A folder on an ext4 of its own. */
async function mountExt4(...options: string[]): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), 'varve-mount-'))
  onTestFinished(() => rm(folder, { recursive: true }))
  const [image, path] = [join(folder, 'image'), join(folder, 'mounted')]
  await writeFile(image, '')
  await truncate(image, 16 * MIB)
  execFileSync('mkfs.ext4', ['-q', ...options, image])
  await mkdir(path)
  execFileSync('mount', ['-o', 'loop', image, path])
  onTestFinished(() => void execFileSync('umount', [path]))
  return path
}

test('what may not be removed keeps no other unfinished upload', async () => {
  const path = await mountExt4()
  const parts = ['a', 'b', 'c', 'd', 'e', 'f'].map(part => `${path}/folder/.varve-part-${part}`)
  await mkdir(`${path}/folder`)
  for (const part of parts) await writeFile(part, 'x')
  execFileSync('chattr', ['+i', ...parts.slice(2, 4)]) // not even root removes them
  const cleanUp = new LocalDriver({ path }).cleanUp({ olderThan: new Date(Date.now() + 10_000) })
  await expect(cleanUp).rejects.toMatchObject({ code: 'STORAGE_ACCESS_DENIED' })
  expect((await readdir(`${path}/folder`)).sort()).toEqual(['.varve-part-c', '.varve-part-d'])
})

/** Gives files their names in one folder, and makes and removes another, without end. Says first that it does. */
const BUSY = `
  const fs = require('node:fs')
  const [path] = process.argv.slice(1)
  for (let turn = 0; ; turn++) {
    fs.writeFileSync(path + '/inst/c/b0/.varve-part-1', 'x')
    fs.renameSync(path + '/inst/c/b0/.varve-part-1', path + '/inst/c/b0/new')
    fs.mkdirSync(path + '/inst/a')
    fs.rmdirSync(path + '/inst/a')
    if (turn === 0) fs.writeSync(1, 'busy')
  }`

test('a listing has all objects while others come and go, also where the file system tells no types of entries', async () => {
  const path = await mountExt4('-O', '^filetype')
  const driver = new LocalDriver({ path })
  const keys = Array.from({ length: 30 }, (_, object) => `inst/c/b${object % 10}/${object}`)
  for (const key of keys) await driver.put(key, bytesBody(bytes))

  const busy = spawn(process.execPath, ['-e', BUSY, path], { stdio: ['ignore', 'pipe', 'inherit'] })
  try {
    await once(busy.stdout, 'data')
    for (let listing = 0; listing < 100; listing++) {
      const listed = new Set<string>()
      for await (const { key } of driver.list('inst/')) listed.add(key)
      expect(keys.filter(key => !listed.has(key))).toEqual([])
    }
  } finally {
    busy.kill()
    await once(busy, 'close')
  }
})
