import { createWriteStream } from 'node:fs'
import { join } from 'node:path'
import { Readable } from 'node:stream'
import { pipeline } from 'node:stream/promises'
import { GetObjectCommand } from '@aws-sdk/client-s3'
import { S3Driver } from '@varve/driver-s3'
import { NetworkProxy } from '@varve/testkit'
import { backUpAcrossCut, compareImages, mountTmpfs, startRadosgw } from '@varve/testkit/lab'
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
  const { partSize: _, ...options } = bucket.options
  await using storage = new S3Driver({ ...options, endpoint: `http://127.0.0.1:${proxy.port}` })

  const { disk, key, cut } = await backUpAcrossCut({ storage, proxy, folder: memory.path, size: SIZE })

  expect(cut).toBeGreaterThanOrEqual(4)
  expect(proxy.bytesToServer).toBeGreaterThan(SIZE)
  expect(proxy.bytesToServer).toBeLessThan(SIZE + 5 * 16 * MIB) // four parts, and what is not of the image
  const { Body } = await bucket.client.send(new GetObjectCommand({ Bucket: bucket.name, Key: key }))
  if (!(Body instanceof Readable)) expect.unreachable('the gateway gave no stream')
  const stored = { path: join(memory.path, 'stored.qcow2'), format: 'qcow2' } as const
  await pipeline(Body, createWriteStream(stored.path))
  expect(await compareImages({ path: disk, format: 'qcow2' }, stored)).toMatchObject({ identical: true })
})
