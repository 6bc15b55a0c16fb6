import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { writeFileSync } from 'node:fs'
import { mkdir, mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { Readable } from 'node:stream'
import { LocalDriver } from '@varve/driver-local'
import { createQcow2, createRaw, qemuIo, sha256Content, sha256File } from '@varve/testkit/lab'
import { execa } from 'execa'
import { afterAll, afterEach, beforeAll, beforeEach, expect, test } from 'vitest'
import { BackupPipeline } from '../src/backup-pipeline.ts'
import { markName } from '../src/backup-plan.ts'
import { diskMark, twinOf } from '../src/bitmap-twin.ts'
import { blake3Hex } from '../src/digest.ts'
import type { VarveEvent } from '../src/events.ts'
import type { Instance } from '../src/host.ts'
import { ImageHost } from '../src/image-host.ts'
import type { BackupManifest } from '../src/manifest.ts'
import { recover } from '../src/recover.ts'
import { RestorePipeline, type RestoreRequest } from '../src/restore-pipeline.ts'

const SIZE = 8 * 1024 * 1024

let workshop: string
let storage: LocalDriver
let manifest: BackupManifest
let wanted: string

let folder: string
let events: VarveEvent[]

beforeAll(async () => {
  workshop = await mkdtemp(join(tmpdir(), 'varve-targets-'))
  await mkdir(join(workshop, 'storage'))
  storage = new LocalDriver({ path: join(workshop, 'storage') })
  const disk = join(workshop, 'disk.qcow2')
  await createQcow2(disk, SIZE)
  await qemuIo(disk, 'qcow2', ['write -P 0x11 1M 3M'])
  wanted = await sha256Content(disk, 'qcow2')
  const host = new ImageHost({ instance: 'web-1', disks: { vda: disk } })
  manifest = await new BackupPipeline({ host, storage, stateDir: join(workshop, 'state') }).run({
    instance: 'web-1',
  })
})
afterAll(() => rm(workshop, { recursive: true }))

beforeEach(async () => {
  folder = await mkdtemp(join(workshop, 'test-'))
  events = []
})
afterEach(() => rm(folder, { recursive: true }))

async function restore(
  request: Omit<RestoreRequest, 'backup'>,
  onEvent: (event: VarveEvent) => void = event => void events.push(event),
): Promise<void> {
  const host = new ImageHost({ instance: 'web-1', disks: {} })
  const pipeline = new RestorePipeline({ host, storage, stateDir: join(workshop, 'state') })
  await pipeline.run({ backup: manifest.id, ...request }, { onEvent })
}

const stages = () => events.flatMap(event => (event.type === 'stage' ? [event.stage] : []))

test('a file that appears at the target meanwhile is never replaced', async () => {
  const path = join(folder, 'restored')
  const theirs = (stage: string) => (event: VarveEvent) => {
    if (event.type === 'stage' && event.stage === stage) writeFileSync(path, 'theirs')
  }
  const to = { disks: { vda: path } }
  await expect(restore({ to }, theirs('write'))).rejects.toMatchObject({
    code: 'TARGET_EXISTS',
    context: { path },
  })
  expect(await readFile(path, 'utf8')).toBe('theirs')
  expect(await readdir(folder)).toEqual(['restored'])

  // At the very last moment: the complete disk is kept until the name is free.
  await rm(path)
  const unresolved = { code: 'RUN_UNRESOLVED', message: expect.stringMatching(/complete as .*varve recover/) }
  await expect(restore({ to }, theirs('swap'))).rejects.toMatchObject(unresolved)
  const recoverNow = () => recover({ stateDir: join(workshop, 'state'), storages: [storage] })
  expect(await recoverNow()).toMatchObject({ ok: false, runs: [{ error: unresolved }] })
  expect(await readFile(path, 'utf8')).toBe('theirs')
  await rm(path)
  expect(await recoverNow()).toMatchObject({ ok: true, runs: [{ outcome: 'finished' }] })
  expect(await sha256Content(path, 'qcow2')).toBe(wanted)
  expect(await readdir(folder)).toEqual(['restored'])

  // Where it was to be overwritten, so is what has appeared.
  await writeFile(path, 'old')
  await restore({ to: { ...to, overwrite: true } }, theirs('write'))
  expect(await sha256Content(path, 'qcow2')).toBe(wanted)
})

test('a disk of the instance that moves before it is held is refused', async () => {
  const [first, second] = [join(folder, 'first'), join(folder, 'second')]
  for (const path of [first, second]) await createQcow2(path, SIZE)
  class MovingHost extends ImageHost {
    #isMoved = false
    override async instance(name: string): Promise<Instance> {
      const disk = this.#isMoved ? second : first
      this.#isMoved = true
      return new ImageHost({ instance: name, disks: { vda: disk } }).instance(name)
    }
  }
  const host = new MovingHost({ instance: 'web-1', disks: {} })
  const pipeline = new RestorePipeline({ host, storage, stateDir: join(workshop, 'state') })
  await expect(pipeline.run({ backup: manifest.id, to: { instance: 'web-1' } })).rejects.toMatchObject({
    code: 'DISK_BUSY',
    context: { path: second },
  })
  expect(await readdir(folder)).toEqual(['first', 'second'])
})

test('a bitmap is told of where one is added', async () => {
  const path = join(folder, 'restored')
  await restore({ to: { disks: { vda: path }, format: 'raw' } })
  expect(stages()).toEqual(['preflight', 'write', 'swap'])
  events = []
  await restore({ to: { disks: { vda: path }, overwrite: true } })
  expect(stages()).toEqual(['preflight', 'write', 'mark', 'swap'])
  const bitmaps = await execa('qemu-img', ['info', '--output=json', path])
  expect(JSON.parse(bitmaps.stdout)['format-specific'].data.bitmaps).toMatchObject([
    { name: `varve-${manifest.id}` },
    { name: twinOf(markName(manifest.id), await diskMark('vda', path)) },
  ])
})

test('a definition whose download breaks off is asked for again', async () => {
  const xml = `<domain><name>web-1</name><devices><disk><source file='/x'/><target dev='vda'/></disk></devices></domain>`
  class Host extends ImageHost {
    defined: string | undefined
    override define(xml?: string): Promise<void> {
      this.defined = xml
      return Promise.resolve()
    }
  }
  const folderOf = join(workshop, 'storage', manifest.instance.name, manifest.chain, manifest.id)
  await writeFile(join(folderOf, 'domain.xml'), xml)
  const definition = { key: 'domain.xml', size: xml.length, blake3: blake3Hex(Buffer.from(xml)) }
  await writeFile(join(folderOf, 'manifest.json'), JSON.stringify({ ...manifest, definition }))
  const tries: string[] = []
  class Unsteady extends LocalDriver {
    override async get(...args: Parameters<LocalDriver['get']>): ReturnType<LocalDriver['get']> {
      if (!args[0].endsWith('domain.xml')) return super.get(...args)
      tries.push(args[0])
      return tries.length > 1 ? super.get(...args) : Readable.from([Buffer.from('<dom')])
    }
  }
  const host = new Host({ instance: 'web-2', disks: {} })
  const unsteady = new Unsteady({ path: join(workshop, 'storage') })
  const pipeline = new RestorePipeline({ host, storage: unsteady, stateDir: join(workshop, 'state') })
  await pipeline.run({ backup: manifest.id, to: { newInstance: 'copy', directory: folder } })
  expect(tries).toHaveLength(2)
  expect(host.defined).toContain(join(folder, 'copy-vda.qcow2'))
})

/** A virtual machine that has the image open, and never gets to its first instruction. */
async function runOn(path: string, format: 'qcow2' | 'raw'): Promise<AsyncDisposable> {
  const vm = spawn(
    'qemu-system-x86_64',
    [
      ...['-machine', 'q35,accel=tcg', '-nodefaults', '-display', 'none', '-S', '-monitor', 'stdio'],
      ...['-drive', `if=none,id=disk,file=${path},format=${format}`, '-device', 'virtio-blk-pci,drive=disk'],
    ],
    { stdio: ['pipe', 'pipe', 'inherit'] },
  )
  const exit = once(vm, 'exit')
  await once(vm.stdout, 'data') // the monitor's greeting: the disk is open
  return {
    [Symbol.asyncDispose]: async () => {
      vm.stdin.end('quit\n')
      await exit
    },
  }
}

test.each([
  ['qcow2', 'as its disk', 'replaced'],
  ['raw', 'as its disk', 'replaced'],
  ['qcow2', 'as a backing file', 'replaced'],
  ['raw', 'as a backing file', 'replaced'],
  ['qcow2', 'as its disk', 'written over'],
  ['raw', 'as its disk', 'written over'],
] as const)('a %s image that a virtual machine has open %s is not %s', async (format, use, how) => {
  const target = join(folder, 'target')
  const overlay = join(folder, 'overlay')
  await (format === 'raw' ? createRaw : createQcow2)(target, SIZE)
  await execa('qemu-img', ['create', '-f', 'qcow2', '-F', format, '-b', target, overlay])
  const before = await sha256File(target)
  const to = { disks: { vda: target }, format, overwrite: true }
  const request = { to, inPlace: how === 'written over' }
  {
    await using _vm = await (use === 'as its disk' ? runOn(target, format) : runOn(overlay, 'qcow2'))
    await expect(restore(request)).rejects.toMatchObject({ code: 'DISK_BUSY', context: { path: target } })
    expect((await readdir(folder)).sort()).toEqual(['overlay', 'target'])
    expect(stages()).not.toContain('write')
  }
  expect(await sha256File(target)).toBe(before)
  await restore(request)
  expect(await sha256Content(target, format)).toBe(wanted)
})
