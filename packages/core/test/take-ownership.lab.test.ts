import { chmod, chown, mkdir, mkdtemp, readdir, readFile, rm, stat, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { LocalDriver } from '@varve/driver-local'
import { createQcow2, qemuIo } from '@varve/testkit/lab'
import { execa } from 'execa'
import { afterAll, afterEach, beforeAll, beforeEach, expect, test } from 'vitest'
import { BackupPipeline } from '../src/backup-pipeline.ts'
import { ImageHost } from '../src/image-host.ts'
import { RestorePipeline } from '../src/restore-pipeline.ts'

const MiB = 1024 * 1024
const program = fileURLToPath(new URL('./restore-over.ts', import.meta.url))

let workshop: string
let storage: LocalDriver
let backup: string
let folder: string
let target: string
const disk = () => join(workshop, 'disk.qcow2')
const pipelineOptions = () => ({
  host: new ImageHost({ instance: 'web-1', disks: { vda: disk() } }),
  storage,
  stateDir: join(workshop, 'state'),
})

beforeAll(async () => {
  workshop = await mkdtemp(join(tmpdir(), 'varve-owner-'))
  await mkdir(join(workshop, 'storage'))
  storage = new LocalDriver({ path: join(workshop, 'storage') })
  await createQcow2(disk(), 4 * MiB)
  await qemuIo(disk(), 'qcow2', ['write -P 0x11 1M 2M'])
  const { id } = await new BackupPipeline(pipelineOptions()).run({ instance: 'web-1' })
  backup = id
})
afterAll(() => rm(workshop, { recursive: true }))

beforeEach(async () => {
  folder = await mkdtemp(join(workshop, 'test-'))
  target = join(folder, 'vda')
  await writeFile(target, 'old')
})
afterEach(() => rm(folder, { recursive: true }))

/** Over the file that is there, by a process that may give no file to another owner. */
async function restoreWithoutChown(): Promise<{ bytesDone: number; error?: unknown }> {
  const args = {
    disk: disk(),
    storagePath: join(workshop, 'storage'),
    stateDir: join(workshop, 'state'),
    backup,
    target,
  }
  const { stdout } = await execa(
    'setpriv',
    ['--bounding-set=-chown', process.execPath, '--import', 'tsx', program, JSON.stringify(args)],
    { timeout: 60_000 },
  )
  return JSON.parse(stdout)
}

test('a file that is replaced keeps its owner and its permissions', async () => {
  await chmod(target, 0o640)
  await chown(target, 1234, 4321)
  const to = { disks: { vda: target }, overwrite: true }
  await new RestorePipeline(pipelineOptions()).run({ backup, to })
  const { uid, gid, mode } = await stat(target)
  expect([uid, gid, mode & 0o7777]).toEqual([1234, 4321, 0o640])
  await qemuIo(target, 'qcow2', ['read -P 0x11 1M 2M'])
})

test('where it cannot, that is told before anything is written, and the old file stays', async () => {
  await chown(target, 1234, 4321)
  expect(await restoreWithoutChown()).toMatchObject({
    bytesDone: 0,
    error: {
      code: 'TARGET_FAILED',
      message: expect.stringMatching(/owner.*EPERM.*Restore as root.*Nothing was changed/s),
      context: { path: target },
    },
  })
  expect(await readdir(folder)).toEqual(['vda'])
  expect(await readFile(target, 'utf8')).toBe('old')
})

test('an owner that the new file has already is not set again', async () => {
  expect((await restoreWithoutChown()).error).toBeUndefined()
  await qemuIo(target, 'qcow2', ['read -P 0x11 1M 2M'])
})
