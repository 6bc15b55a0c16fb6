import { createWriteStream } from 'node:fs'
import { join } from 'node:path'
import { Readable } from 'node:stream'
import { pipeline } from 'node:stream/promises'
import { GetObjectCommand } from '@aws-sdk/client-s3'
import { BackupPipeline, ImageHost } from '@varve/core'
import { S3Driver } from '@varve/driver-s3'
import { NetworkProxy } from '@varve/testkit'
import { compareImages, createDenseQcow2, mountTmpfs, startRadosgw } from '@varve/testkit/lab'
import { expect, onTestFinished, test } from 'vitest'
import { TestBucket } from './s3-target.ts'

const MIB = 1024 * 1024
const SIZE = 1024 * MIB

test('a backup of 1 GiB whose connections are cut in the middle sends again only the parts that were on their way', async () => {
  await using gateway = await startRadosgw()
  const bucket = await TestBucket.make(gateway, await gateway.createUser('varve'))
  await using proxy = await NetworkProxy.start(gateway)
  const memory = await mountTmpfs('size=1200m')
  onTestFinished(() => memory.dispose())
  const disk = join(memory.path, 'vda.qcow2')
  await createDenseQcow2(disk, SIZE)
  const { partSize: _, ...options } = bucket.options
  await using storage = new S3Driver({ ...options, endpoint: `http://127.0.0.1:${proxy.port}` })

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

  expect(cut).toBeGreaterThanOrEqual(4)
  expect(proxy.bytesToServer).toBeGreaterThan(SIZE)
  expect(proxy.bytesToServer).toBeLessThan(SIZE + 5 * 16 * MIB) // four parts, and what is not of the image
  const Key = `${instance.name}/${chain}/${id}/vda.qcow2`
  const { Body } = await bucket.client.send(new GetObjectCommand({ Bucket: bucket.name, Key }))
  if (!(Body instanceof Readable)) expect.unreachable('the gateway gave no stream')
  const stored = join(memory.path, 'stored.qcow2')
  await pipeline(Body, createWriteStream(stored))
  const comparison = await compareImages({ path: disk, format: 'qcow2' }, { path: stored, format: 'qcow2' })
  expect(comparison).toMatchObject({ identical: true })
})
