import { execFileSync } from 'node:child_process'
import { mkdir, mkdtemp, readdir, readFile, rm, statfs, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { LocalDriver } from '@varve/driver-local'
import { createQcow2, mountTmpfs } from '@varve/testkit/lab'
import { afterEach, beforeEach, expect, onTestFinished, test, vi } from 'vitest'
import { BackupPipeline } from '../src/backup-pipeline.ts'
import { ImageHost } from '../src/image-host.ts'
import type { BackupManifest } from '../src/manifest.ts'
import { namelessFile } from '../src/nameless-file.ts'
import { recover } from '../src/recover.ts'
import { RestorePipeline } from '../src/restore-pipeline.ts'

let folder: string
let disk: string
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'varve-state-'))
  disk = join(folder, 'disk.qcow2')
  await createQcow2(disk, 1024 * 1024)
  await mkdir(join(folder, 'storage'))
})
afterEach(async () => {
  vi.unstubAllEnvs()
  await rm(folder, { recursive: true })
})

const storage = () => new LocalDriver({ path: join(folder, 'storage') })

function backup(stateDir: string): Promise<BackupManifest> {
  const host = new ImageHost({ instance: 'web-1', disks: { vda: disk } })
  return new BackupPipeline({ host, storage: storage(), stateDir }).run({ instance: 'web-1' })
}

/** A backup that cannot use its state folder names it, and touches neither the disk nor the storage. */
async function expectFailure(stateDir: string, errno: string): Promise<void> {
  const before = await readFile(disk)
  const error = {
    code: 'STATE_DIR_FAILED',
    message: expect.stringContaining(stateDir),
    context: { path: expect.stringContaining(stateDir), errno },
  }
  await expect(backup(stateDir)).rejects.toMatchObject(error)
  expect(before.equals(await readFile(disk))).toBe(true)
  expect(await readdir(join(folder, 'storage'))).toEqual([])
}

async function mounted(): Promise<string> {
  const small = await mountTmpfs('size=64k')
  onTestFinished(() => small.dispose())
  return small.path
}

/** Leaves so many bytes of a file system. */
async function fill(path: string, leave: number): Promise<void> {
  await rm(join(path, 'fill'), { force: true })
  const { bavail, bsize } = await statfs(path)
  await writeFile(join(path, 'fill'), Buffer.alloc(bavail * bsize - leave))
}

test('a state folder that is full, before and in the middle, is told and leaves no journal', async () => {
  const stateDir = await mounted()
  await mkdir(join(stateDir, 'runs'))
  await fill(stateDir, 0)
  await expectFailure(stateDir, 'ENOSPC')
  expect(await readdir(join(stateDir, 'runs'))).toEqual([])

  // Room for the journal's first page, and none for what is to be noted beside it.
  await fill(stateDir, 4096)
  await expectFailure(stateDir, 'ENOSPC')
  expect(await readdir(join(stateDir, 'runs'))).toEqual([])
  expect(await recover({ stateDir, storages: [] })).toEqual({ runs: [], ok: true })
})

test('a state folder that is read-only, below a file, or where none can be, is told', async () => {
  const readOnly = await mounted()
  execFileSync('mount', ['-o', 'remount,ro', readOnly])
  await expectFailure(readOnly, 'EROFS')
  await expectFailure(join(disk, 'state'), 'ENOTDIR')
  await expect(recover({ stateDir: join(disk, 'state'), storages: [] })).rejects.toMatchObject({
    code: 'STATE_DIR_FAILED',
  })
  await expectFailure('/proc/nope', 'ENOENT')
})

test('a folder of temporary files that takes none is told, and TMPDIR as what can be done', async () => {
  const stateDir = join(folder, 'state')
  const target = join(folder, 'target.qcow2')
  const { id } = await backup(stateDir)
  await createQcow2(target, 1024 * 1024)
  const before = await readFile(target)
  const readOnly = await mounted()
  execFileSync('mount', ['-o', 'remount,ro', readOnly])
  vi.stubEnv('TMPDIR', readOnly)
  const error = {
    code: 'STATE_DIR_FAILED',
    message: expect.stringMatching(new RegExp(`${readOnly}.*TMPDIR`)),
    context: { errno: 'EROFS' },
  }
  await expect(backup(stateDir)).rejects.toMatchObject(error)
  const host = new ImageHost({ instance: 'web-1', disks: { vda: target } })
  const restore = new RestorePipeline({ host, stateDir, storage: storage() })
  await expect(restore.run({ backup: id, to: { instance: 'web-1' }, inPlace: true })).rejects.toMatchObject(
    error,
  )
  await expect(namelessFile('<domain/>')).rejects.toMatchObject(error)
  expect(before.equals(await readFile(target))).toBe(true)

  vi.unstubAllEnvs()
  expect(await recover({ stateDir, storages: [storage()] })).toEqual({ runs: [], ok: true })
  expect(await backup(stateDir)).toMatchObject({ kind: 'incremental', parent: id })
})
