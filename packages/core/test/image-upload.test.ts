import { NbdError } from '@varve/nbd'
import { ComposedImage, ExtentKind, ExtentList, planImage } from '@varve/qcow2'
import { expect, test } from 'vitest'
import { ImageUpload } from '../src/image-upload.ts'
import { RateLimit } from '../src/rate-limit.ts'
import { readUpload } from '../src/upload-source.ts'
import { TestClock } from './test-clock.ts'

const MiB = 1024 * 1024

test('a disk that cannot be read is told as such by whatever reads the upload', async () => {
  const extents = new ExtentList()
  extents.append(8 * MiB, ExtentKind.data)
  const image = new ComposedImage(planImage(extents, { clusterSize: 65_536 }), {
    async read(offset) {
      if (offset >= 4 * MiB)
        throw new NbdError('NBD_SERVER', 'The server answered a read with EIO.', { errno: 'EIO' })
    },
  })
  const upload = new ImageUpload(image, { disk: 'vda' })
  const read = async () => {
    for await (const _chunk of readUpload(upload, { key: 'web-1/vda.qcow2' }));
  }
  await expect(read()).rejects.toMatchObject({
    code: 'NBD_FAILED',
    message: expect.stringMatching(/disk vda.*EIO.*try again/s),
    context: { disk: 'vda', reason: 'NBD_SERVER' },
    cause: { code: 'NBD_SERVER' },
  })
})

test('none of eight parts that share a bandwidth is silent for long, and all together keep to it', async () => {
  const extents = new ExtentList()
  extents.append(8 * MiB, ExtentKind.data)
  const image = new ComposedImage(planImage(extents, { clusterSize: 65_536 }), {
    read: async () => undefined,
  })
  const clock = new TestClock()
  const bandwidth = 256 * 1024
  const upload = new ImageUpload(image, { disk: 'vda', limit: new RateLimit(bandwidth, clock) })
  let silence = 0
  const partSize = image.size / 8
  const parts = Array.from({ length: 8 }, async (_, part) => {
    let last = clock.now()
    for await (const chunk of upload.open({
      start: Math.floor(part * partSize),
      end: Math.floor((part + 1) * partSize),
    }) as AsyncIterable<Uint8Array>) {
      silence = Math.max(silence, clock.now() - last)
      last = clock.now()
      upload.recycle(chunk)
    }
  })
  await clock.run()
  await Promise.all(parts)
  expect(silence).toBeLessThanOrEqual(1000)
  expect(clock.now()).toBeGreaterThan((image.size / bandwidth) * 1000 - 100)
})
