import { readdirSync, writeFileSync } from 'node:fs'
import { mkdtemp, readdir, rm, stat } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { LocalDriver } from '@varve/driver-local'
import { createQcow2, sha256Content } from '@varve/testkit/lab'
import { afterAll, beforeAll, beforeEach, expect, onTestFinished, test } from 'vitest'
import { BackupPipeline } from '../src/backup-pipeline.ts'
import type { VarveEvent } from '../src/events.ts'
import { ImageHost } from '../src/image-host.ts'
import type { BackupManifest } from '../src/manifest.ts'
import { recover } from '../src/recover.ts'
import { RestorePipeline, type RestoreRequest } from '../src/restore-pipeline.ts'
import { abortAtStep } from './abort-at-step.ts'
import { storeImage } from './stored-image.ts'
import { mountNew, type Unmountable } from './unmountable.ts'

const SIZE = 8 * 1024 * 1024

let workshop: string
let stateDir: string
let storage: LocalDriver
let manifest: BackupManifest
let wanted: string
beforeAll(async () => {
  workshop = await mkdtemp(join(tmpdir(), 'varve-unmounted-'))
  ;({ storage, stateDir, manifest, wanted } = await storeImage(workshop, SIZE))
})
afterAll(() => rm(workshop, { recursive: true }))

let fileSystem: Unmountable
let path: string
let host: ImageHost
beforeEach(async () => {
  fileSystem = await mountNew()
  onTestFinished(() => fileSystem.dispose())
  path = join(fileSystem.path, 'vda')
  host = new ImageHost({ instance: 'web-1', disks: { vda: { path, format: 'qcow2' } } })
})

async function restore(
  request: Omit<RestoreRequest, 'backup'>,
  onEvent: (event: VarveEvent) => void = () => undefined,
  signal?: AbortSignal,
): Promise<void> {
  const pipeline = new RestorePipeline({ host, storage, stateDir })
  await pipeline.run({ backup: manifest.id, ...request }, { onEvent, ...(signal && { signal }) })
}

async function recovered() {
  const warnings: string[] = []
  const onEvent = (event: VarveEvent) => {
    if (event.type === 'warning') warnings.push(event.message)
  }
  const { ok, runs } = await recover({ stateDir, storages: [storage] }, { onEvent })
  return { ok, outcomes: runs.map(({ outcome }) => outcome), error: runs[0]?.error, warnings }
}

const nothing = { ok: true, outcomes: [] }
const unresolved = (...words: string[]) => ({
  ok: false,
  outcomes: ['unresolved'],
  error: {
    code: 'RUN_UNRESOLVED',
    message: expect.stringMatching(
      new RegExp([...words, 'may not be mounted yet', 'varve recover', 'runs/.*jsonl'].join('.*')),
    ),
  },
})

test('a disk that a restore in place left incomplete stays on record while its file system is not mounted', async () => {
  await createQcow2(path, SIZE)
  const request = { to: { instance: 'web-1' }, inPlace: true }
  await expect(restore(request, undefined, abortAtStep('write-in-place'))).rejects.toMatchObject({
    context: { incomplete: ['vda'] },
  })
  const incomplete = { ok: false, outcomes: ['incomplete'], warnings: [] }
  expect(await recovered()).toMatchObject(incomplete)
  fileSystem.unmount()
  expect(await recovered()).toMatchObject({
    ...incomplete,
    warnings: [expect.stringMatching(/vda .*may not be mounted yet.*remove runs\/.*jsonl/)],
  })
  fileSystem.mount()
  expect(await recovered()).toMatchObject(incomplete)
  await expect(
    new BackupPipeline({ host, storage, stateDir }).run({ instance: 'web-1' }),
  ).rejects.toMatchObject({ code: 'DISK_INCOMPLETE' })
  await rm(path) // from its own folder, which is there
  expect(await recovered()).toMatchObject(nothing)
})

test('a restore that is complete is not finished while the file system of its new disk is not mounted, nor where somebody has removed that', async () => {
  const takeName = (event: VarveEvent) => {
    if (event.type === 'stage' && event.stage === 'swap') writeFileSync(path, 'theirs')
  }
  const to = { disks: { vda: path } }
  for (const end of ['mounted', 'removed'] as const) {
    await expect(restore({ to }, takeName)).rejects.toMatchObject({ code: 'RUN_UNRESOLVED' })
    await rm(path)
    fileSystem.unmount()
    expect(await recovered()).toMatchObject(unresolved('complete as', 'neither there nor at'))
    fileSystem.mount()
    const [temporary = ''] = (await readdir(fileSystem.path)).filter(name => name.startsWith('vda.varve-'))
    if (end === 'removed') {
      await rm(join(fileSystem.path, temporary))
      expect(await recovered()).toMatchObject(unresolved('complete as', 'neither there nor at'))
      await rm(join(stateDir, 'runs'), { recursive: true }) // as it says
      continue
    }
    expect(await recovered()).toMatchObject({ ok: true, outcomes: ['finished'] })
    expect(await sha256Content(path, 'qcow2')).toBe(wanted)
    await rm(path)
  }
})

test('the new file of a restore that failed as its file system went away is removed once that is back', async () => {
  const isNew = (name: string) => name.includes('.varve-restore-')
  const given = new AbortController()
  const loseAll = () => {
    if (given.signal.aborted || !readdirSync(fileSystem.path).some(isNew)) return
    fileSystem.unmount('lazily')
    given.abort(new Error('everything goes away'))
  }
  const to = { disks: { vda: path } }
  await expect(restore({ to }, loseAll, given.signal)).rejects.toMatchObject({ code: 'RUN_UNRESOLVED' })
  expect(await recovered()).toMatchObject(unresolved('to be removed'))
  fileSystem.mount()
  expect((await readdir(fileSystem.path)).filter(isNew)).toHaveLength(1)
  expect(await recovered()).toMatchObject({ ok: true, outcomes: ['undone'] })
  expect((await readdir(fileSystem.path)).filter(isNew)).toEqual([])
  await expect(stat(path)).rejects.toMatchObject({ code: 'ENOENT' })
})
