import { mkdir, readdir, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { Readable } from 'node:stream'
import { bytesBody } from '@varve/core'
import { RcloneDriver, RcloneHelper } from '@varve/driver-rclone'
import { describe, expect, onTestFinished, test, vi } from 'vitest'
import { begin, beginWithScript, listed, scriptFile } from './rclone-lab.ts'
import { filesIn } from './rclone-target.ts'

describe('the remote', () => {
  test('that is not configured is named', async () => {
    const { configFile } = await begin()
    const driver = new RcloneDriver({ remoteName: 'tape', configFile })
    await expect(driver.stat('a')).rejects.toMatchObject({
      code: 'INVALID_CONFIG',
      message: expect.stringContaining('remoteName'),
    })
  })

  test('whose folder is missing is STORAGE_NOT_FOUND, and is not made by an upload unless it is to be', async () => {
    const { configFile, path } = await begin()
    const driver = new RcloneDriver({ remoteName: 'nas', configFile, pathPrefix: 'backup/missing' })
    const missing = { code: 'STORAGE_NOT_FOUND' }
    await expect(driver.put('a', bytesBody(Buffer.from('x')))).rejects.toMatchObject(missing)
    await expect(driver.list('').next()).rejects.toMatchObject(missing)
    expect(await readdir(path)).toEqual([])
    const made = new RcloneDriver({
      remoteName: 'nas',
      configFile,
      pathPrefix: 'backup/missing',
      create: true,
    })
    await made.put('a', bytesBody(Buffer.from('x')))
    expect(await filesIn(path)).toEqual([{ name: 'missing/a', size: 1 }])
  })

  test.each([
    ['after a file was given', '', 'a: error listing: directory not found'],
    ['of another folder than the listed one', 'b/', 'c: error listing: directory not found'],
  ])('a listing that ends with "not found" %s is no whole one', async (_, prefix, said) => {
    const { driver, path } = await beginWithScript(
      `case "$1 $2" in "lsjson -R") rclone "$@"; echo "2026/01/01 00:00:00 ERROR : ${said}" >&2; exit 3;; esac`,
    )
    await mkdir(join(path, 'a'))
    await writeFile(join(path, 'a/b'), 'x')
    await expect(listed(driver, prefix)).rejects.toMatchObject({
      code: 'STORAGE_FAILED',
      retryable: true,
      context: { stderr: expect.stringContaining(said) },
    })
  })

  test('whose folder goes away is not made again by a later upload', async () => {
    const { driver, path, commands } = await begin()
    const uploads = async () => {
      const before = commands.length
      await driver.put('a', bytesBody(Buffer.from('x')))
      return commands.slice(before).map(({ args }) => args[0])
    }
    expect(await uploads()).toContain('lsf')
    expect(await uploads(), 'an upload that follows soon looks for nothing').not.toContain('lsf')
    await rm(path, { recursive: true })
    const later = performance.now() + 60_000
    vi.spyOn(performance, 'now').mockReturnValue(later)
    onTestFinished(() => void vi.restoreAllMocks())
    for (const key of ['b', 'c/d']) {
      const upload = driver.put(key, bytesBody(Buffer.from('x')))
      await expect(upload).rejects.toMatchObject({ code: 'STORAGE_NOT_FOUND' })
    }
    await mkdir(path) // it was not there
  })

  test('whose folder is gone when an upload is made again is not made by that', async () => {
    const command = await scriptFile(
      `case "$1" in rcat) rm -r "$(cat "$0.path")"; echo "Failed: connection reset" >&2; exit 1;; esac`,
    )
    const { driver, path } = await begin({ command })
    await writeFile(`${command}.path`, path)
    const upload = driver.put('a', bytesBody(Buffer.from('x')))
    await expect(upload).rejects.toMatchObject({ code: 'STORAGE_NOT_FOUND' })
    await mkdir(path) // it was not there
  })

  test('a prefix that is a file lists nothing', async () => {
    const { driver, path } = await begin()
    await writeFile(join(path, 'a'), 'x')
    expect(await listed(driver, 'a/')).toEqual([])
    await mkdir(join(path, 'b'))
    await writeFile(join(path, 'b/b'), 'x')
    expect(await listed(driver, 'b/')).toEqual(['b/b'])
  })

  test('its features tell whether an upload needs a size', async () => {
    const { configFile } = await begin()
    const helper = new RcloneHelper({ remoteName: 'nas', configFile })
    expect(await helper.features()).toEqual({
      streamingUpload: true,
      hasFolders: true,
      duplicateNames: false,
      tellsSpace: true,
      keepsParts: false,
    })
    expect(await helper.version()).toMatch(/^1\.\d+\.\d+$/)
  })

  test('one that takes no upload without a size is not sent one', async () => {
    const { driver, path } = await beginWithScript(
      'case "$1" in backend) echo "{\\"Features\\":{\\"PutStream\\":false}}"; exit;; esac',
    )
    await expect(driver.put('a', Readable.from([Buffer.from('x')]))).rejects.toMatchObject({
      code: 'UPLOAD_FAILED',
      message: expect.stringMatching(/^rclone rcat: failed to upload a: .*size/),
    })
    await driver.put('b', bytesBody(Buffer.from('x')))
    expect(await filesIn(path)).toEqual([{ name: 'b', size: 1 }])
  })
})
