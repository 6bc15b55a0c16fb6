import { execFileSync } from 'node:child_process'
import { mkdir, readdir, readFile, rename, symlink, truncate, writeFile } from 'node:fs/promises'
import { buffer } from 'node:stream/consumers'
import { bytesBody } from '@varve/core'
import { LocalDriver } from '@varve/driver-local'
import { describe, expect, test } from 'vitest'
import { temporaryStorage } from './temporary-storage.ts'

const bytes = Buffer.from('mine')

async function listed(driver: LocalDriver, prefix = ''): Promise<string[]> {
  const keys: string[] = []
  for await (const { key } of driver.list(prefix)) keys.push(key)
  return keys.sort()
}

describe('a storage that somebody else can write to', () => {
  test('a symbolic link in place of a folder leads nowhere', async () => {
    const { path, outside } = await temporaryStorage()
    await writeFile(`${outside}/secret`, 'secret')
    await symlink(outside, `${path}/link`)
    await mkdir(`${path}/inner`)
    await symlink(outside, `${path}/inner/link`)
    const driver = new LocalDriver({ path })
    for (const folder of ['link', 'inner/link']) {
      await expect(driver.put(`${folder}/new`, bytesBody(bytes))).rejects.toMatchObject({
        code: 'STORAGE_FAILED',
        message: expect.stringContaining('symbolic link'),
      })
      await expect(driver.put(`${folder}/new/deep`, bytesBody(bytes))).rejects.toMatchObject({
        code: 'STORAGE_FAILED',
      })
      await expect(driver.get(`${folder}/secret`)).rejects.toMatchObject({ code: 'OBJECT_NOT_FOUND' })
      expect(await driver.stat(`${folder}/secret`)).toBeUndefined()
      await driver.delete(`${folder}/secret`)
      expect(await listed(driver, `${folder}/`)).toEqual([])
    }
    expect(await listed(driver)).toEqual([])
    expect(await driver.cleanUp({ olderThan: new Date(Date.now() + 10_000) })).toBe(0)
    expect(await readdir(outside)).toEqual(['secret'])
    expect(await readFile(`${outside}/secret`, 'utf8')).toBe('secret')
  })

  test('a symbolic link in place of an object is no object, and is replaced or removed itself', async () => {
    const { path, outside } = await temporaryStorage()
    await writeFile(`${outside}/secret`, 'secret')
    await symlink(`${outside}/secret`, `${path}/replaced`)
    await symlink(`${outside}/secret`, `${path}/removed`)
    const driver = new LocalDriver({ path })
    await expect(driver.get('replaced')).rejects.toMatchObject({ code: 'OBJECT_NOT_FOUND' })
    expect(await driver.stat('replaced')).toBeUndefined()
    expect(await listed(driver)).toEqual([])
    await driver.put('replaced', bytesBody(bytes))
    await driver.delete('removed')
    expect(await readdir(path)).toEqual(['replaced'])
    expect(await buffer(await driver.get('replaced'))).toEqual(bytes)
    expect(await readFile(`${outside}/secret`, 'utf8')).toBe('secret')
  })

  test('a folder that is swapped for a symbolic link again and again lets nothing out', {
    timeout: 60_000,
  }, async () => {
    const { path, outside } = await temporaryStorage()
    await writeFile(`${outside}/key`, 'secret')
    await symlink(outside, `${path}/link`)
    await mkdir(`${path}/folder`)
    const driver = new LocalDriver({ path })
    let swapping = true
    const swaps = (async () => {
      while (swapping) {
        for (const [from, to] of [
          ['folder', 'aside'],
          ['link', 'folder'],
          ['folder', 'link'],
          ['aside', 'folder'],
        ]) {
          // a driver that finds no folder makes it, which is right and in the way here
          await rename(`${path}/${from}`, `${path}/${to}`).catch(() => undefined)
        }
      }
    })()
    try {
      for (let turn = 0; turn < 60; turn++) {
        await driver.put('folder/key', bytesBody(bytes)).catch(() => undefined)
        const found = await driver.get('folder/key').then(buffer, () => undefined)
        if (found) expect(found.toString()).toBe('mine')
        await driver.delete('folder/key').catch(() => undefined)
      }
    } finally {
      swapping = false
      await swaps
    }
    expect(await readdir(outside)).toEqual(['key'])
    expect(await readFile(`${outside}/key`, 'utf8')).toBe('secret')
  })

  test('what is no plain file is no object, and holds nothing up', async () => {
    const { path } = await temporaryStorage()
    execFileSync('mkfifo', [`${path}/fifo`])
    const driver = new LocalDriver({ path })
    await expect(driver.get('fifo')).rejects.toMatchObject({
      code: 'OBJECT_NOT_FOUND',
      message: expect.stringContaining('use another backup'),
    })
    expect(await driver.stat('fifo')).toBeUndefined()
    expect(await listed(driver)).toEqual([])
  })

  test('files whose names are no keys are not listed', async () => {
    const { path } = await temporaryStorage()
    await mkdir(`${path}/bad\nfolder`)
    for (const name of ['good', 'line\nfeed', 'back\\slash', 'bad\nfolder/file', '.varve-part-1']) {
      await writeFile(`${path}/${name}`, 'x')
    }
    await writeFile(Buffer.concat([Buffer.from(`${path}/latin-`), Buffer.from([0xfc])]), 'x')
    expect(await listed(new LocalDriver({ path }))).toEqual(['good'])
  })

  test('an object that is cut short while it is read fails the download', async () => {
    const { path } = await temporaryStorage()
    const driver = new LocalDriver({ path })
    await driver.put('object', bytesBody(Buffer.alloc(20_000_000)))
    const download = await driver.get('object')
    await truncate(`${path}/object`, 5_000_000)
    await expect(buffer(download)).rejects.toMatchObject({
      code: 'STORAGE_FAILED',
      message: expect.stringContaining('ended after 5000000 bytes'),
    })
  })
})
