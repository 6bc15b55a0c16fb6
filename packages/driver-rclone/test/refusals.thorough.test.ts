import { once } from 'node:events'
import { mkdir } from 'node:fs/promises'
import { join } from 'node:path'
import { buffer } from 'node:stream/consumers'
import { RcloneDriver, type RcloneDriverOptions } from '@varve/driver-rclone'
import { PatternBody } from '@varve/testkit'
import { type SshdLab, startSshd } from '@varve/testkit/lab'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { expectRefused } from './remotes.ts'

let sshd: SshdLab
beforeAll(async () => {
  sshd = await startSshd()
})
afterAll(() => sshd?.[Symbol.asyncDispose]())

const sftp = () => ({
  type: 'sftp',
  host: '127.0.0.1',
  port: String(sshd.port),
  user: sshd.username,
  pass: sshd.password,
})

test.each<[string, string, () => RcloneDriverOptions]>([
  [
    'a wrong password',
    'STORAGE_ACCESS_DENIED',
    () => ({ remoteName: 'nas', remotes: { nas: { ...sftp(), pass: 'wrong-pass' } } }),
  ],
  [
    'a server that is not there',
    'STORAGE_UNREACHABLE',
    () => ({ remoteName: 'nas', remotes: { nas: { ...sftp(), port: '9' } } }),
  ],
  [
    'a missing folder',
    'STORAGE_NOT_FOUND',
    () => ({ remoteName: 'nas', remotes: { nas: sftp() }, pathPrefix: 'no/such' }),
  ],
  [
    'an endpoint that is not there',
    'STORAGE_UNREACHABLE',
    () => ({
      remoteName: 'cloud',
      remotes: {
        cloud: {
          type: 's3',
          provider: 'Ceph',
          endpoint: 'http://127.0.0.1:9',
          access_key_id: 'nobody',
          secret_access_key: 'wrong-pass',
        },
      },
      pathPrefix: 'bucket',
    }),
  ],
])('%s is %s for a listing, and a failed check', async (_, code, options) => {
  const driver = new RcloneDriver({ ...options(), timeoutMs: 10_000 })
  await expectRefused(driver, code, [sshd.password, 'wrong-pass'])
})

test('a check tells a folder that may not be written to', async () => {
  await mkdir(join(sshd.home, 'fixed'), { mode: 0o755 }) // root's
  const fixed = new RcloneDriver({ remoteName: 'nas', remotes: { nas: sftp() }, pathPrefix: 'fixed' })
  expect((await fixed.check()).checks).toMatchObject([
    { name: 'connect', ok: true },
    { name: 'write', ok: false, code: 'STORAGE_ACCESS_DENIED' },
  ])
})

test('a server that is killed while it sends fails the download', async () => {
  const driver = new RcloneDriver({
    remoteName: 'nas',
    remotes: { nas: sftp() },
    pathPrefix: 'kill',
    create: true,
  })
  await driver.put('large', new PatternBody({ size: 60_000_000 }))
  const download = await driver.get('large')
  await once(download, 'readable')
  const [outcome] = await Promise.allSettled([buffer(download), sshd.restart()])
  expect(outcome).toMatchObject({ status: 'rejected', reason: { name: 'VarveError' } })
  expect(await driver.stat('large')).toMatchObject({ size: 60_000_000 })
})
