import { mkdir, mkdtemp, rename, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { LocalDriver } from '@varve/driver-local'
import { compareImages, createQcow2, qemuIo } from '@varve/testkit/lab'
import { afterEach, beforeEach, expect, test } from 'vitest'
import { BackupPipeline } from '../src/backup-pipeline.ts'
import { ImageHost } from '../src/image-host.ts'
import type { BackupManifest } from '../src/manifest.ts'
import { RestorePipeline, type RestoreRequest } from '../src/restore-pipeline.ts'

const SIZE = 4 * 1024 * 1024
const DISKS = ['vda', 'vdb'] as const

let folder: string
let pipelines: ConstructorParameters<typeof RestorePipeline>[0]
const image = (disk: string) => join(folder, `${disk}.qcow2`)

beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'varve-exchanged-'))
  await mkdir(join(folder, 'storage'))
  const disks = { vda: image('vda'), vdb: image('vdb') }
  pipelines = {
    host: new ImageHost({ instance: 'web-1', disks }),
    storage: new LocalDriver({ path: join(folder, 'storage') }),
    stateDir: join(folder, 'state'),
  }
  for (const [pattern, disk] of [
    [0x10, 'vda'],
    [0x20, 'vdb'],
  ] as const) {
    await createQcow2(image(disk), SIZE)
    await qemuIo(image(disk), 'qcow2', [`write -P ${pattern} 0 2M`])
  }
})
afterEach(() => rm(folder, { recursive: true }))

const backup = () => new BackupPipeline(pipelines).run({ instance: 'web-1' })
const restore = (request: RestoreRequest) => new RestorePipeline(pipelines).run(request)

async function exchange(): Promise<void> {
  await rename(image('vda'), join(folder, 'between'))
  await rename(image('vdb'), image('vda'))
  await rename(join(folder, 'between'), image('vdb'))
}

/** Takes a backup, whose disks must be to QEMU what the files hold. */
async function rightBackup(): Promise<BackupManifest> {
  const manifest = await backup()
  const { chain, id } = manifest
  for (const disk of DISKS) {
    const path = join(folder, 'storage', 'web-1', chain, id, `${disk}.qcow2`)
    const { identical, message } = await compareImages(
      { path, format: 'qcow2' },
      { path: image(disk), format: 'qcow2' },
    )
    expect(identical, `${disk}: ${message}`).toBe(true)
  }
  return manifest
}

test('two disks whose files somebody exchanged are not taken for what they were', async () => {
  const first = await backup()
  await exchange()
  for (const disk of DISKS) await qemuIo(image(disk), 'qcow2', ['write -P 0x30 3M 64k'])
  const full = await rightBackup()
  expect(full.disks).toMatchObject([{ fallback: 'disk-replaced' }, { fallback: 'disk-replaced' }])
  expect(full.chain).not.toBe(first.chain)

  // Back in its place before the next backup a file has still all that it needs.
  await exchange()
  for (const disk of DISKS) await qemuIo(image(disk), 'qcow2', ['write -P 0x40 1M 64k'])
  await exchange()
  expect(await rightBackup()).toMatchObject({ kind: 'incremental', parent: full.id })
})

test.each(['replaced', 'written over'])(
  'a disk whose file was %s by the backup of another disk is not taken for what it was',
  async how => {
    const first = await backup()
    const to = { disks: { vda: image('vdb') }, overwrite: true }
    await restore({ backup: first.id, to, inPlace: how === 'written over' })
    await qemuIo(image('vda'), 'qcow2', ['write -P 0x30 3M 64k'])
    const next = await rightBackup()
    expect(next.disks).toMatchObject([{ kind: 'incremental' }, { fallback: 'disk-replaced' }])
    expect(next.parent).toBe(first.id)
  },
)
