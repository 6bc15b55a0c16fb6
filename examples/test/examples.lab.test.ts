import { mkdir, mkdtemp, readdir, rm, stat, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { ChainManager, type Host, ImageHost } from '@varve/core'
import { LocalDriver } from '@varve/driver-local'
import { createQcow2, qemuIo, sha256Content, startLibvirt } from '@varve/testkit/lab'
import { execa } from 'execa'
import { afterEach, beforeEach, expect, test } from 'vitest'
import { BackupQueue } from '../embed-in-a-panel/backup-queue.ts'
import type { JobView } from '../embed-in-a-panel/job-view.ts'

const MiB = 1024 * 1024

let folder: string
let storagePath: string
let stateDir: string

beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'varve-examples-'))
  storagePath = join(folder, 'storage')
  stateDir = join(folder, 'state')
  await mkdir(storagePath)
})
afterEach(() => rm(folder, { recursive: true }))

async function runExample(path: string, ...args: string[]): Promise<string> {
  const script = fileURLToPath(new URL(`../${path}`, import.meta.url))
  const { stdout } = await execa(process.execPath, [script, ...args])
  return stdout
}

async function createDisk(name: string): Promise<string> {
  const path = join(folder, `${name}.qcow2`)
  await createQcow2(path, 64 * MiB)
  await qemuIo(path, 'qcow2', ['write -P 0x11 0 8M', 'write -P 0x22 32M 1M', 'write -z 2M 1M'])
  return path
}

test('the quickstart leaves a chain of two on the storage and the instance as it was at the second', async () => {
  await using lab = await startLibvirt()
  const disk = await createDisk('vda')
  await lab.createDomain({ name: 'web-1', disks: [{ target: 'vda', path: disk, format: 'qcow2' }] })
  const wanted = await sha256Content(disk, 'qcow2')
  const before = (await stat(disk)).ino

  const output = await runExample('quickstart/quickstart.ts', 'web-1', storagePath, stateDir, lab.uri)

  expect(output).toContain('0 backups could go')
  const { backups } = await new ChainManager({ storage: new LocalDriver({ path: storagePath }) }).list()
  expect(backups.map(({ manifest }) => manifest.kind)).toEqual(['full', 'incremental'])
  expect((await stat(disk)).ino).not.toBe(before) // it was replaced
  expect(await sha256Content(disk, 'qcow2')).toBe(wanted)
})

test('the newest backup is restored to raw images without touching the instance', async () => {
  const disk = await createDisk('vda')
  const host = new ImageHost({ instance: 'web-1', disks: { vda: disk } })
  const queue = queueOf(() => host)
  await queue.add('web-1').result
  await qemuIo(disk, 'qcow2', ['write -P 0x33 1M 64k'])
  await queue.add('web-1').result
  const wanted = await sha256Content(disk, 'qcow2')
  await qemuIo(disk, 'qcow2', ['write -P 0x44 0 16M'])
  const left = await sha256Content(disk, 'qcow2')
  const target = join(folder, 'restored')
  await mkdir(target)

  await runExample('restore-to-new-image/restore-to-new-image.ts', 'web-1', storagePath, target, stateDir)

  expect(await readdir(target)).toEqual(['vda.raw'])
  expect(await sha256Content(join(target, 'vda.raw'), 'raw')).toBe(wanted)
  expect(await sha256Content(disk, 'qcow2')).toBe(left)
})

test('a panel sees its backups wait, run and end, and what it cancels leaves nothing', async () => {
  const hosts = new Map<string, Host>()
  for (const instance of ['web-1', 'web-2', 'web-3']) {
    hosts.set(instance, new ImageHost({ instance, disks: { vda: await createDisk(instance) } }))
  }
  const states = new Map<number, JobView['state'][]>()
  const queue: BackupQueue = queueOf(
    instance => hosts.get(instance) ?? new ImageHost({ instance, disks: {} }),
    (id, { state, stage }) => {
      const seen = states.get(id) ?? []
      if (seen.at(-1) !== state) states.set(id, [...seen, state])
      if (id === 2 && stage.startsWith('Uploading')) queue.cancel(2)
    },
  )
  expect(await queue.recover()).toEqual({ runs: [], ok: true })

  const first = queue.add('web-1')
  const second = queue.add('web-2')
  const third = queue.add('web-3')
  const fourth = queue.add('web-4')
  queue.cancel(third.id)
  const manifests = await Promise.all([first.result, second.result, third.result, fourth.result])

  expect(manifests.map(manifest => manifest?.instance.name)).toEqual([
    'web-1',
    undefined,
    undefined,
    undefined,
  ])
  expect(Object.fromEntries(states)).toEqual({
    1: ['waiting', 'running', 'done'],
    2: ['waiting', 'running', 'cancelled'],
    3: ['waiting', 'cancelled'],
    4: ['waiting', 'running', 'failed'],
  })
  expect(queue.view(first.id)).toMatchObject({
    percent: 100,
    notes: [expect.stringContaining('full backup')],
  })
  expect(queue.view(fourth.id)?.notes).toEqual([expect.stringContaining('DISK_NOT_FOUND')])
  expect(await readdir(storagePath)).toEqual(['web-1'])
  expect(await queue.recover()).toEqual({ runs: [], ok: true })
})

test('a panel shows a good backup whose host needs attention, settles a run that died meanwhile, and survives its own views', async () => {
  const host = new ImageHost({ instance: 'web-1', disks: { vda: await createDisk('web-1') } })
  let spoil: (() => Promise<void>) | undefined
  let spoilt: Promise<void> | undefined
  const queue = queueOf(
    () => host,
    (_, { state, stage }) => {
      if (spoil && stage.startsWith('Reading')) {
        spoilt = spoil()
        spoil = undefined
      }
      if (state === 'done') throw new Error('the browser is gone')
      return Promise.reject(new Error('and so is its socket'))
    },
  )
  const [first] = [await queue.add('web-1').result, await queue.add('web-1').result]
  const record = join(stateDir, 'marks', 'web-1', `${first?.id}.json`)
  spoil = async () => {
    await rm(record, { force: true, recursive: true })
    await mkdir(record) // is removed by no means that is for files
  }
  const third = queue.add('web-1')
  expect(await third.result).toBeUndefined()
  await spoilt
  const { backups } = await new ChainManager({ storage: new LocalDriver({ path: storagePath }) }).list()
  expect(backups).toHaveLength(3)
  expect(queue.view(third.id)).toMatchObject({
    state: 'attention',
    backup: backups.at(-1)?.manifest.id,
    notes: [expect.stringContaining('STATE_DIR_FAILED')],
  })
  queue.forget(third.id)
  expect(queue.view(third.id)).toBeUndefined()

  await rm(record, { recursive: true })
  const dead = '20260101-000000-000-abcdef'
  const header = {
    ...{ version: 1, id: dead, kind: 'backup', instance: 'web-1', host: host.reference },
    storage: { type: 'local', location: storagePath },
    disks: [{ name: 'vda', path: join(folder, 'web-1.qcow2') }],
    startedAt: '2026-01-01T00:00:00.000Z',
  }
  await writeFile(join(stateDir, 'runs', `${dead}.jsonl`), `${JSON.stringify(header)}\n`)
  expect(await queue.add('web-1').result).toMatchObject({ kind: 'incremental' })
  expect(await readdir(join(stateDir, 'runs'))).toEqual([])
})

function queueOf(hostOf: (instance: string) => Host, onChange?: (id: number, view: JobView) => void) {
  const storage = new LocalDriver({ path: storagePath })
  return new BackupQueue({ storage, stateDir, hostOf, concurrency: 1, ...(onChange && { onChange }) })
}
