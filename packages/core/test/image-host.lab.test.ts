import { mkdir, mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { LocalDriver } from '@varve/driver-local'
import { createQcow2, createRaw, qemuIo, sha256Content, sha256File } from '@varve/testkit/lab'
import { execa } from 'execa'
import { afterEach, beforeEach, expect, test } from 'vitest'
import { BackupPipeline } from '../src/backup-pipeline.ts'
import { type ImageDisk, ImageHost } from '../src/image-host.ts'
import { RestorePipeline } from '../src/restore-pipeline.ts'

const MiB = 1024 * 1024
let folder: string
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'varve-images-'))
  await mkdir(join(folder, 'storage'))
})
afterEach(() => rm(folder, { recursive: true }))

function pipelines(vda: ImageDisk) {
  const storage = new LocalDriver({ path: join(folder, 'storage') })
  const host = new ImageHost({ instance: 'web-1', disks: { vda } })
  return { host, storage, stateDir: join(folder, 'state') }
}

test('a block device that its guest made look like a qcow2 image is not taken for one', async () => {
  const [raw, inner] = [join(folder, 'raw'), join(folder, 'inner')]
  await createRaw(raw, 8 * MiB)
  await qemuIo(raw, 'raw', ['write -P 0x33 4M 4M'])
  await createQcow2(inner, MiB)
  await execa('dd', [`if=${inner}`, `of=${raw}`, 'conv=notrunc'])
  const { stdout: device } = await execa('losetup', ['--find', '--show', raw])
  try {
    const before = await sha256File(device)
    const guessing = new BackupPipeline(pipelines(device)).run({ instance: 'web-1' })
    await expect(guessing).rejects.toMatchObject({
      code: 'DISK_UNSUPPORTED',
      message: expect.stringContaining(`--disk vda=${device},format=`),
      context: { disk: 'vda', path: device, format: 'qcow2' },
    })
    expect(await sha256File(device)).toBe(before)

    const stated = pipelines({ path: device, format: 'raw' })
    const { id } = await new BackupPipeline(stated).run({ instance: 'web-1' })
    const restored = join(folder, 'restored')
    await new RestorePipeline(stated).run({ backup: id, to: { disks: { vda: restored } } })
    expect(await sha256Content(restored, 'qcow2')).toBe(before)
    expect(await sha256File(device)).toBe(before)
  } finally {
    await execa('losetup', ['--detach', device])
  }
})

test('an image of another format is told of with what to do', async () => {
  const image = join(folder, 'vda.vmdk')
  await execa('qemu-img', ['create', '-f', 'vmdk', image, '1M'])
  await expect(pipelines(image).host.instance('web-1')).rejects.toMatchObject({
    code: 'DISK_UNSUPPORTED',
    message: expect.stringMatching(/format vmdk.*qemu-img convert.*format=raw/),
  })
  await expect(pipelines({ path: image, format: 'qcow2' }).host.instance('web-1')).rejects.toMatchObject({
    code: 'DISK_UNSUPPORTED',
    message: expect.stringContaining('See that it is a whole image'),
  })
})
