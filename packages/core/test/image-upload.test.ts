import { NbdError } from '@varve/nbd'
import { ComposedImage, ExtentKind, ExtentList, planImage } from '@varve/qcow2'
import { expect, test } from 'vitest'
import { ImageUpload } from '../src/image-upload.ts'
import { readUpload } from '../src/upload-source.ts'

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
