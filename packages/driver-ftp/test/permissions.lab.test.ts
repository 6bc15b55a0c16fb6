import { execFile } from 'node:child_process'
import { chmod, chown, mkdir, readdir, stat, symlink, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { buffer } from 'node:stream/consumers'
import { promisify } from 'node:util'
import { bytesBody } from '@varve/core'
import { FtpDriver, type FtpDriverOptions } from '@varve/driver-ftp'
import { troubledSource } from '@varve/testkit'
import { startVsftpd, type VsftpdLab } from '@varve/testkit/lab'
import { afterAll, beforeAll, describe, expect, onTestFinished, test } from 'vitest'
import { begin, ftpTarget, listed, optionsOf } from './ftp-target.ts'

const x = bytesBody(Buffer.from('x'))

describe('permissions', () => {
  let lab: VsftpdLab
  beforeAll(async () => {
    lab = await startVsftpd()
  })
  afterAll(() => lab[Symbol.asyncDispose]())

  async function beginTarget() {
    const target = await ftpTarget(lab, await optionsOf(lab, 'none'))
    onTestFinished(() => target.dispose())
    return target
  }

  test('an object that may not be read is told from one that is not there', async () => {
    const { driver, path } = await beginTarget()
    await driver.put('a/secret', x)
    await chmod(join(path, 'a/secret'), 0)
    await expect(driver.get('a/secret')).rejects.toMatchObject({ code: 'STORAGE_ACCESS_DENIED' })
    await expect(driver.get('a/none')).rejects.toMatchObject({ code: 'OBJECT_NOT_FOUND' })
    expect(await driver.stat('a/secret')).toMatchObject({ size: 1 })
  })

  test('what is in a folder that may not be entered is denied, and not missing', async () => {
    const { driver, path } = await beginTarget()
    await driver.put('closed/folder/object', x)
    await chmod(join(path, 'closed'), 0)
    const denied = { code: 'STORAGE_ACCESS_DENIED' }
    for (const key of ['closed/folder/object', 'closed/none']) {
      await expect(driver.stat(key)).rejects.toMatchObject(denied)
      await expect(driver.get(key)).rejects.toMatchObject(denied)
      await expect(driver.delete(key)).rejects.toMatchObject(denied)
      await expect(driver.put(key, x)).rejects.toMatchObject(denied)
    }
    await expect(listed(driver, '')).rejects.toMatchObject(denied)
    await chmod(join(path, 'closed'), 0o700)
    expect(await driver.stat('closed/folder/object')).toMatchObject({ size: 1 })
  })

  test('a folder that may not be listed is an error, and not empty', async () => {
    const { driver, path } = await beginTarget()
    await driver.put('unlisted/object', x)
    await chmod(join(path, 'unlisted'), 0o300)
    await expect(listed(driver, '')).rejects.toMatchObject({ code: 'STORAGE_ACCESS_DENIED' })
    expect(await buffer(await driver.get('unlisted/object'))).toHaveLength(1)
    await chmod(join(path, 'unlisted'), 0o700)
  })

  test('a folder that may not be written to denies uploads and deletes', async () => {
    const { driver, path } = await beginTarget()
    await driver.put('fixed/object', x)
    await chmod(join(path, 'fixed'), 0o500)
    const denied = { code: 'STORAGE_ACCESS_DENIED' }
    await expect(driver.put('fixed/new', x)).rejects.toMatchObject(denied)
    await expect(driver.put('fixed/folder/new', x)).rejects.toMatchObject(denied)
    await expect(driver.delete('fixed/object')).rejects.toMatchObject(denied)
    await chmod(join(path, 'fixed'), 0o700)
    expect(await readdir(join(path, 'fixed'))).toEqual(['object'])
  })

  test('what may not be removed keeps no other unfinished upload', async () => {
    const { driver, path } = await beginTarget()
    const { uid, gid } = await stat(path)
    for (const part of [1, 2]) await writeFile(join(path, `.varve-part-${part}`), 'x')
    await chown(join(path, '.varve-part-2'), uid, gid)
    await chmod(path, 0o1777) // each removes what is his own
    await chown(path, 0, 0)
    const cleanUp = driver.cleanUp?.({ olderThan: new Date(Date.now() + 10_000) })
    await expect(cleanUp).rejects.toMatchObject({ code: 'STORAGE_ACCESS_DENIED' })
    expect(await readdir(path)).toEqual(['.varve-part-1'])
  })

  test('an account that may not delete is found out by a check, and told what it left', async () => {
    const { lab, driver } = await begin({ config: ['cmds_denied=DELE,RMD'] })
    const { ok, checks } = await driver.check()
    expect(ok).toBe(false)
    expect(checks.at(-1)).toMatchObject({ name: 'delete', ok: false, code: 'STORAGE_ACCESS_DENIED' })
    const source = troubledSource({ kind: 'fail', error: new Error('boom') }, { bytes: 100_000 })
    await expect(driver.put('a/b', source)).rejects.toMatchObject({
      code: 'UPLOAD_FAILED',
      message: expect.stringMatching(/boom.*left as a\/\.varve-part-/),
    })
    expect(await readdir(join(lab.home, 'a'))).toHaveLength(1)
    expect(await listed(driver, 'a')).toEqual([])
  })

  test.each(['STOR', 'RNFR', 'RNTO'])(
    'an account that may not %s is told so, and nothing is left',
    async verb => {
      const { lab, driver } = await begin({ config: [`cmds_denied=${verb}`] })
      await expect(driver.put('a/b', x)).rejects.toMatchObject({ code: 'STORAGE_ACCESS_DENIED' })
      expect(await readdir(lab.home)).toEqual([])
    },
  )

  test('symbolic links are no objects, and are not followed in listings', async () => {
    const { driver, path } = await beginTarget()
    await driver.put('real/object', x)
    await symlink('real', join(path, 'link'))
    await symlink('/', join(path, 'everything'))
    expect((await listed(driver, '')).map(({ key }) => key)).toEqual(['real/object'])
  })

  test('a folder that is removed under a driver is missing, and not an empty storage', async () => {
    const target = await beginTarget()
    expect(await listed(target.driver, '')).toEqual([])
    await promisify(execFile)('rmdir', [target.path])
    const missing = { code: 'STORAGE_NOT_FOUND' }
    await expect(listed(target.driver, '')).rejects.toMatchObject(missing)
    await expect(target.driver.stat('a/b')).rejects.toMatchObject(missing)
    await expect(target.driver.put('a/b', x)).rejects.toMatchObject(missing)
  })
})

describe('a check', () => {
  let lab: VsftpdLab
  beforeAll(async () => {
    lab = await startVsftpd({ config: ['delay_failed_login=0'] })
  })
  afterAll(() => lab[Symbol.asyncDispose]())

  test.each<[string, Partial<FtpDriverOptions>, string, RegExp]>([
    ['the host is not known', { host: 'nowhere.invalid' }, 'STORAGE_UNREACHABLE', /host is not known/],
    ['nobody listens', { port: 1 }, 'STORAGE_UNREACHABLE', /refused/],
    ['the server has no TLS', { tls: 'explicit' }, 'STORAGE_UNREACHABLE', /TLS/],
    ['the password is wrong', { password: 'wrong' }, 'STORAGE_ACCESS_DENIED', /username and the password/],
    ['the folder is missing', { pathPrefix: 'none' }, 'STORAGE_NOT_FOUND', /none/],
  ])('tells that %s', async (_, different, code, message) => {
    await using driver = new FtpDriver({ ...(await optionsOf(lab, 'none')), attempts: 1, ...different })
    const { ok, checks } = await driver.check()
    expect(ok).toBe(false)
    expect(checks).toEqual([{ name: 'connect', ok: false, code, message: expect.stringMatching(message) }])
  })

  test('tells that the account may not write', async () => {
    await mkdir(join(lab.home, 'fixed'), { mode: 0o755 }) // root's
    await using driver = new FtpDriver({ ...(await optionsOf(lab, 'none')), pathPrefix: 'fixed' })
    expect((await driver.check()).checks).toMatchObject([
      { name: 'connect', ok: true },
      { name: 'write', ok: false, code: 'STORAGE_ACCESS_DENIED' },
    ])
  })
})

describe('folders', () => {
  let lab: VsftpdLab
  beforeAll(async () => {
    lab = await startVsftpd()
  })
  afterAll(() => lab[Symbol.asyncDispose]())

  test('the folder of the storage is made when asked for', async () => {
    const options = await optionsOf(lab, 'none')
    await using missing = new FtpDriver({ ...options, pathPrefix: 'new/"backups" ü' })
    await expect(missing.put('a', x)).rejects.toMatchObject({ code: 'STORAGE_NOT_FOUND' })
    await using driver = new FtpDriver({ ...options, pathPrefix: 'new/"backups" ü', create: true })
    await driver.put('a/b', x)
    expect(await readdir(join(lab.home, 'new/"backups" ü/a'))).toEqual(['b'])
    await driver.delete('a/b')
    expect(await readdir(join(lab.home, 'new/"backups" ü'))).toEqual([])
  })

  test('without a prefix the storage is where a login begins', async () => {
    await using driver = new FtpDriver(await optionsOf(lab, 'none'))
    await driver.put('top', x)
    expect(await readdir(lab.home)).toContain('top')
    await driver.delete('top')
  })

  test('what others put there is listed only where it is an object', async () => {
    const target = await ftpTarget(lab, await optionsOf(lab, 'none'))
    onTestFinished(() => target.dispose())
    await mkdir(join(target.path, 'others'))
    for (const name of [
      'ordinary',
      'back\\slash',
      '.varve-part-left',
      'total 5',
      '-rw-r--r-- 1 a b 5 Jan 1 2020 fake',
    ]) {
      await writeFile(join(target.path, 'others', name), '123')
    }
    await chown(join(target.path, 'others'), 0, 0)
    const keys = (await listed(target.driver, '')).map(({ key, size }) => [key, size])
    expect(keys.sort()).toEqual([
      ['others/-rw-r--r-- 1 a b 5 Jan 1 2020 fake', 3],
      ['others/ordinary', 3],
      ['others/total 5', 3],
    ])
  })
})
