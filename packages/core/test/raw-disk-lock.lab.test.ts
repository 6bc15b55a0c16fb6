import { once } from 'node:events'
import { appendFile, mkdir, mkdtemp, readdir, rename, rm, symlink } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createQcow2, createRaw, qemuIo } from '@varve/testkit/lab'
import { execa } from 'execa'
import { afterEach, beforeEach, expect, test } from 'vitest'
import { BackupPipeline } from '../src/backup-pipeline.ts'
import type { InstanceDisks } from '../src/host.ts'
import { ImageHost } from '../src/image-host.ts'
import { PausingStorage } from './vm-site.ts'

let folder: string
let disk: string
let storage: PausingStorage
let pipeline: BackupPipeline

beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'varve-raw-'))
  await mkdir(join(folder, 'storage'))
  disk = join(folder, 'a "disk", with, commas')
  await createRaw(disk, 4 * 1024 * 1024)
  storage = new PausingStorage({ path: join(folder, 'storage') })
  const host = new ImageHost({ instance: 'web-1', disks: { vda: { path: disk, format: 'raw' } } })
  pipeline = new BackupPipeline({ host, storage, stateDir: join(folder, 'state') })
})
afterEach(() => rm(folder, { recursive: true }))

/** A program of QEMU's that has the disk open until the end, as a virtual machine has. */
async function opened(...options: string[]): Promise<AsyncDisposable> {
  const child = execa('qemu-io', ['-f', 'raw', ...options, disk], { stdin: 'pipe', buffer: false })
  await once(child.stdout, 'data') // its prompt
  return {
    async [Symbol.asyncDispose]() {
      child.stdin.end()
      await child
    },
  }
}

test('a raw disk that is open for writing is not read as one that is off, though nothing is written', async () => {
  await using _writer = await opened()
  await expect(pipeline.run({ instance: 'web-1' })).rejects.toMatchObject({
    code: 'DISK_BUSY',
    message: expect.stringMatching(/back .* up by its libvirt name/),
    context: { disk: 'vda', path: disk },
    retryable: true,
  })
  expect(await readdir(join(folder, 'storage'))).toEqual([])
  expect(await readdir(join(folder, 'state', 'runs'))).toEqual([])
})

test('a raw disk that others only read is backed up, and nobody can open it for writing meanwhile', async () => {
  await using _reader = await opened('-r')
  let refusal: unknown
  storage.beforePut = async key => {
    if (key.endsWith('.qcow2'))
      refusal = await qemuIo(disk, 'raw', ['quit']).catch((reason: unknown) => reason)
  }
  await pipeline.run({ instance: 'web-1' })
  expect(refusal).toMatchObject({ stderr: expect.stringContaining('lock') })
  await qemuIo(disk, 'raw', ['write 0 1M'])
})

test('a disk that moves to another file while its lock is taken is not read without one', async () => {
  const link = join(folder, 'link')
  await symlink(disk, link)
  const other = join(folder, 'other')
  await createRaw(other, 4 * 1024 * 1024)
  class Moving extends ImageHost {
    override async disks(name: string): Promise<InstanceDisks> {
      const found = await super.disks(name)
      await symlink(other, join(folder, 'new'))
      await rename(join(folder, 'new'), link)
      return found
    }
  }
  const host = new Moving({ instance: 'web-1', disks: { vda: { path: link, format: 'raw' } } })
  const moving = new BackupPipeline({ host, storage, stateDir: join(folder, 'state') })
  await expect(moving.run({ instance: 'web-1' })).rejects.toMatchObject({
    code: 'DISK_BUSY',
    context: { disk: 'vda', path: other },
    retryable: true,
  })
  expect(await readdir(join(folder, 'storage'))).toEqual([])
})

test('a disk that waits for its turn is not written to meanwhile, or the backup fails', async () => {
  const disks = { vda: join(folder, 'vda.qcow2'), vdb: join(folder, 'vdb.qcow2') }
  for (const path of Object.values(disks)) await createQcow2(path, 4 * 1024 * 1024)
  const host = new ImageHost({ instance: 'web-1', disks })
  const pipeline = new BackupPipeline({ host, storage, stateDir: join(folder, 'state') })
  const run = () => pipeline.run({ instance: 'web-1', concurrency: 1 })
  let refusal: unknown
  storage.beforePut = async key => {
    if (key.endsWith('vda.qcow2'))
      refusal = await qemuIo(disks.vdb, 'qcow2', ['write 0 1M']).catch((reason: unknown) => reason)
  }
  const full = await run()
  expect(refusal).toMatchObject({ stderr: expect.stringContaining('lock') })

  // A program that does not ask for QEMU's locks.
  storage.beforePut = async key => {
    if (key.endsWith('vda.qcow2')) await appendFile(disks.vdb, 'x')
  }
  await expect(run()).rejects.toMatchObject({
    code: 'DISK_BUSY',
    context: { disk: 'vdb' },
    retryable: true,
  })
  storage.beforePut = undefined
  expect(await run()).toMatchObject({ parent: full.id, consistency: 'offline' })
})
