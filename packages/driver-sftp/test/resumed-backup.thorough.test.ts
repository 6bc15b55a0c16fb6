import { chmod } from 'node:fs/promises'
import { join } from 'node:path'
import { SftpDriver } from '@varve/driver-sftp'
import { NetworkProxy } from '@varve/testkit'
import { backUpAcrossCut, compareImages, mountTmpfs, startSshd } from '@varve/testkit/lab'
import { expect, onTestFinished, test } from 'vitest'
import { login } from './sftp-target.ts'

const MIB = 1024 * 1024
const SIZE = 1024 * MIB

test('a backup of 1 GiB whose connection is cut in the middle goes on from what the server has kept', async () => {
  const memory = await mountTmpfs('size=1200m') // before the server, which sees the mounts of its beginning
  onTestFinished(() => memory.dispose())
  await using server = await startSshd()
  await using proxy = await NetworkProxy.start({ port: server.port })
  await chmod(memory.path, 0o711)
  const pathPrefix = join(memory.path, 'backups')
  await server.makeFolder(pathPrefix)
  await using storage = new SftpDriver({ ...(await login(server)), port: proxy.port, pathPrefix })

  const { disk, key, cut } = await backUpAcrossCut({ storage, proxy, folder: memory.path, size: SIZE })

  expect(cut).toBe(1)
  expect(proxy.bytesToServer).toBeGreaterThan(SIZE)
  expect(proxy.bytesToServer).toBeLessThan(1.15 * SIZE) // SSH's own bytes, and what was not durable yet
  const stored = { path: join(pathPrefix, key), format: 'qcow2' } as const
  expect(await compareImages({ path: disk, format: 'qcow2' }, stored)).toMatchObject({ identical: true })
})
