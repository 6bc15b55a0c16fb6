import { chmod, chown, mkdir, mkdtemp, readdir, readFile, rm, stat, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { LocalDriver } from '@varve/driver-local'
import { createQcow2, qemuIo } from '@varve/testkit/lab'
import { afterAll, afterEach, beforeAll, beforeEach, expect, test, vi } from 'vitest'
import { BackupPipeline } from '../src/backup-pipeline.ts'
import type { VarveEvent } from '../src/events.ts'
import { ImageHost } from '../src/image-host.ts'
import { RestorePipeline } from '../src/restore-pipeline.ts'

vi.mock('node:fs/promises', { spy: true })

const MiB = 1024 * 1024
const refused = Object.assign(new Error('EPERM: operation not permitted, chown'), { code: 'EPERM' })

let workshop: string
let storage: LocalDriver
let backup: string
let folder: string
let target: string
let events: VarveEvent[]
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
  events = []
})
afterEach(async () => {
  vi.mocked(chown).mockReset()
  await rm(folder, { recursive: true })
})

/** Over the file that is there. */
async function restore(): Promise<void> {
  const to = { disks: { vda: target }, overwrite: true }
  const onEvent = (event: VarveEvent) => void events.push(event)
  await new RestorePipeline(pipelineOptions()).run({ backup, to }, { onEvent })
}

test('a file that is replaced keeps its owner and its permissions', async () => {
  await chmod(target, 0o640)
  await chown(target, 1234, 4321)
  await restore()
  const { uid, gid, mode } = await stat(target)
  expect([uid, gid, mode & 0o7777]).toEqual([1234, 4321, 0o640])
  await qemuIo(target, 'qcow2', ['read -P 0x11 1M 2M'])
})

test('where it cannot, that is told before anything is written, and the old file stays', async () => {
  await chown(target, 1234, 4321)
  vi.mocked(chown).mockRejectedValue(refused) // as for whoever is not root
  await expect(restore()).rejects.toMatchObject({
    code: 'TARGET_FAILED',
    message: expect.stringMatching(/owner.*EPERM.*Restore as root.*Nothing was changed/s),
    context: { path: target },
  })
  expect(await readdir(folder)).toEqual(['vda'])
  expect(await readFile(target, 'utf8')).toBe('old')
  const progress = events.flatMap(event => (event.type === 'progress' ? [event.bytesDone] : []))
  expect(Math.max(0, ...progress)).toBe(0)
})

test('an owner that the new file has already is not set again', async () => {
  vi.mocked(chown).mockRejectedValue(refused)
  await restore()
  await qemuIo(target, 'qcow2', ['read -P 0x11 1M 2M'])
})
