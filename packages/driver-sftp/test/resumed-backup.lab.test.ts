import { chmod } from 'node:fs/promises'
import { join } from 'node:path'
import { BackupPipeline, ImageHost } from '@varve/core'
import { SftpDriver } from '@varve/driver-sftp'
import { NetworkProxy } from '@varve/testkit'
import { compareImages, createDenseQcow2, mountTmpfs, startSshd } from '@varve/testkit/lab'
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
  const folder = join(memory.path, 'backups')
  await server.makeFolder(folder)
  const disk = join(memory.path, 'vda.qcow2')
  await createDenseQcow2(disk, SIZE)
  await using storage = new SftpDriver({
    ...(await login(server)),
    port: proxy.port,
    pathPrefix: folder,
  })

  let cut = 0
  const host = new ImageHost({ instance: 'web-1', disks: { vda: disk } })
  const backups = new BackupPipeline({ host, storage, stateDir: join(memory.path, 'state') })
  const { instance, chain, id } = await backups.run(
    { instance: 'web-1' },
    {
      onEvent(event) {
        if (cut > 0 || event.type !== 'progress' || event.bytesDone < SIZE / 2) return
        cut = proxy.connections
        proxy.cutAll()
      },
    },
  )

  expect(cut).toBe(1)
  expect(proxy.bytesToServer).toBeGreaterThan(SIZE)
  expect(proxy.bytesToServer).toBeLessThan(1.15 * SIZE) // SSH's own bytes, and what was not durable yet
  const stored = join(folder, instance.name, chain, id, 'vda.qcow2')
  const comparison = await compareImages({ path: disk, format: 'qcow2' }, { path: stored, format: 'qcow2' })
  expect(comparison).toMatchObject({ identical: true })
})
