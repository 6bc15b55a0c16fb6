import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { BackupPipeline, RestorePipeline } from '@varve/core'
import { SftpDriver } from '@varve/driver-sftp'
import { startSshd } from '@varve/testkit/lab'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { login } from '../../driver-sftp/test/sftp-target.ts'
import { expectSame, RbdInstance } from './rbd-instance.ts'
import { RbdSite } from './rbd-site.ts'

let site: RbdSite
beforeAll(async () => {
  site = await RbdSite.start()
})
afterAll(() => site[Symbol.asyncDispose]())

test('the streams, whose size nobody knows before, go to an SFTP server and come back', async () => {
  await using lab = await startSshd()
  const pathPrefix = join(lab.home, 'storage')
  await lab.makeFolder(pathPrefix)
  await using sftp = new SftpDriver({ ...(await login(lab)), pathPrefix })
  const image = await site.create(16 * 1024 ** 2)
  const web = await RbdInstance.of(site, `rbd:${image}`)
  const options = { ...web.parts(), storage: sftp }
  await site.write(image, 'write -P 1 0 9M')
  await new BackupPipeline(options).run({ instance: 'web-1' })
  await site.write(image, 'write -P 2 8M 4M', 'discard 0 1M')
  const { id, kind } = await new BackupPipeline(options).run({ instance: 'web-1' })
  expect(kind).toBe('incremental')
  const path = join(web.folder, 'restored')
  await new RestorePipeline(options).run({ backup: id, to: { disks: { vda: path }, format: 'raw' } })
  expectSame(await readFile(path), await site.bytes(image))
})
