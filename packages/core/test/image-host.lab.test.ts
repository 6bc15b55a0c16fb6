import { once } from 'node:events'
import { mkdir, mkdtemp, rename, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { LocalDriver } from '@varve/driver-local'
import { createQcow2, createRaw, qemuIo, sha256Content, sha256File } from '@varve/testkit/lab'
import { execa } from 'execa'
import { afterEach, beforeEach, expect, test } from 'vitest'
import { newBackupId } from '../src/backup-id.ts'
import { BackupPipeline } from '../src/backup-pipeline.ts'
import { VarveError } from '../src/errors.ts'
import type { VarveEvent } from '../src/events.ts'
import { isFileDisk } from '../src/host.ts'
import { type ImageDisk, ImageHost } from '../src/image-host.ts'
import { type RecoveredRun, recover } from '../src/recover.ts'
import { RestorePipeline } from '../src/restore-pipeline.ts'
import type { StoredObject } from '../src/storage.ts'
import { storeFake } from './fake-backup.ts'
import { noRejectionUnhandled } from './no-rejection-unhandled.ts'

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

test('a backup after one from a clock that was ahead is the newest, and warns', async () => {
  const image = join(folder, 'vda')
  await createQcow2(image, MiB)
  const parts = pipelines(image)
  const warnings: string[] = []
  const onEvent = (event: VarveEvent) => event.type === 'warning' && void warnings.push(event.message)
  const run = () => new BackupPipeline(parts).run({ instance: 'web-1' }, { onEvent })
  const hours = (count: number) => newBackupId(undefined, new Date(Date.now() + count * 60 * 60 * 1000))
  const [near, far] = [hours(23), hours(25)]
  await storeFake(parts.storage, { id: near })
  expect((await run()).id > near).toBe(true)
  expect(warnings).toEqual([])
  await storeFake(parts.storage, { id: far })
  expect((await run()).id > far).toBe(true)
  expect(warnings).toEqual([expect.stringContaining(`has the id ${far}`)])
})

test('recover leaves a backup and a restore alone that go on, and says so', async () => {
  const image = join(folder, 'vda')
  await createQcow2(image, MiB)
  await qemuIo(image, 'qcow2', ['write -P 0x11 0 64k'])
  const { storage: _, ...parts } = pipelines(image)
  const told: RecoveredRun[] = []
  const ask = async () => {
    const { runs } = await recover({ ...parts, storages: [] })
    told.push(...runs)
  }
  class AskingStorage extends LocalDriver {
    override async put(...args: Parameters<LocalDriver['put']>): Promise<StoredObject> {
      await ask()
      return super.put(...args)
    }
    override async get(...args: Parameters<LocalDriver['get']>): ReturnType<LocalDriver['get']> {
      await ask()
      return super.get(...args)
    }
  }
  const asking = { ...parts, storage: new AskingStorage({ path: join(folder, 'storage') }) }
  const { id } = await new BackupPipeline(asking).run({ instance: 'web-1' })
  await new RestorePipeline(asking).run({ backup: id, to: { disks: { vda: join(folder, 'restored') } } })
  expect(new Set(told.map(({ kind }) => kind))).toEqual(new Set(['backup', 'restore']))
  expect(new Set(told.map(({ outcome }) => outcome))).toEqual(new Set(['running']))
})

test('a backup that failed is settled also where its image is no qcow2 any more, and so has no bitmaps', async () => {
  const image = join(folder, 'vda')
  await createQcow2(image, MiB)
  const full = new VarveError('STORAGE_FULL', 'full')
  class FullStorage extends LocalDriver {
    override async put(...args: Parameters<LocalDriver['put']>): Promise<StoredObject> {
      if (!args[0].endsWith('/vda.qcow2')) return super.put(...args)
      await execa('qemu-img', ['convert', '-U', '-O', 'raw', image, `${image}.raw`])
      await rename(`${image}.raw`, image)
      throw full
    }
  }
  const storage = new FullStorage({ path: join(folder, 'storage') })
  const host = new ImageHost({ instance: 'web-1', disks: { vda: image } })
  const stateDir = join(folder, 'state')
  const pipeline = new BackupPipeline({ host, storage, stateDir })
  await expect(pipeline.run({ instance: 'web-1' })).rejects.toBe(full)
  expect(await recover({ stateDir, storages: [storage] })).toEqual({ ok: true, runs: [] })
})

test('a backup and a restore are whole also where their listener rejects each time', async () => {
  await using _ = await noRejectionUnhandled()
  const image = join(folder, 'vda')
  await createQcow2(image, 8 * MiB)
  await qemuIo(image, 'qcow2', ['write -P 0x33 4M 4M'])
  const options = pipelines(image)
  const told: string[] = []
  const onEvent = async ({ type }: VarveEvent) => {
    told.push(type)
    throw new Error('the database is away')
  }
  const { id } = await new BackupPipeline(options).run({ instance: 'web-1' }, { onEvent })
  const restored = join(folder, 'restored')
  await new RestorePipeline(options).run({ backup: id, to: { disks: { vda: restored } } }, { onEvent })
  expect(await sha256Content(restored, 'qcow2')).toBe(await sha256Content(image, 'qcow2'))
  expect(told).toEqual(expect.arrayContaining(['stage', 'command', 'progress']))
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

test('a bitmap that an image has already is kept, one that it cannot be given is told of with the cause', async () => {
  const image = join(folder, 'vda')
  await createQcow2(image, MiB)
  await execa('qemu-img', ['bitmap', '--add', '-f', 'qcow2', image, 'varve-mine'])
  await qemuIo(image, 'qcow2', ['write 0 64k'])
  const { host } = pipelines({ path: image, format: 'qcow2' })
  const disks = (await host.instance('web-1')).disks.filter(isFileDisk)
  const add = () => host.addBitmap('web-1', disks, 'varve-mine', 65536)
  for (let time = 1; time <= 2; time++) {
    await add()
    const [found] = (await host.instance('web-1')).disks.filter(isFileDisk)
    // Its twin, which began later, lacks the write that it has.
    expect(found?.bitmaps).toMatchObject([{ name: 'varve-mine', twin: 'agrees', enabled: true }])
    expect(found?.bitmaps[0]?.names).toHaveLength(2)
  }
  const refused = (code: string) => expect(add()).rejects.toMatchObject({ code, context: { path: image } })
  const user = execa('qemu-io', ['-f', 'qcow2', image], { stdin: 'pipe', buffer: false })
  await once(user.stdout, 'data') // its prompt
  await refused('DISK_BUSY')
  user.stdin.end()
  await user
  await createQcow2(image, MiB)
  await execa('qemu-img', ['amend', '-f', 'qcow2', '-o', 'compat=0.10', image])
  await refused('COMMAND_FAILED') // that version holds none
  await rm(image)
  await refused('DISK_NOT_FOUND')
})
