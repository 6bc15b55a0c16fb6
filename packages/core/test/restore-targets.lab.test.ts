import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { writeFileSync } from 'node:fs'
import { mkdtemp, open, readdir, readFile, rm, writeFile } from 'node:fs/promises'
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
import type { Host, Instance } from '../src/host.ts'
import { ImageHost } from '../src/image-host.ts'
import type { BackupManifest } from '../src/manifest.ts'
import { recover } from '../src/recover.ts'
import { RestorePipeline, type RestoreRequest } from '../src/restore-pipeline.ts'
import { abortAtStep } from './abort-at-step.ts'
import { storeImage } from './stored-image.ts'

const SIZE = 8 * 1024 * 1024

let workshop: string
let stateDir: string
let storage: LocalDriver
let manifest: BackupManifest
let wanted: string

let folder: string
let events: VarveEvent[]

beforeAll(async () => {
  workshop = await mkdtemp(join(tmpdir(), 'varve-targets-'))
  ;({ storage, stateDir, manifest, wanted } = await storeImage(workshop, SIZE))
})
afterAll(() => rm(workshop, { recursive: true }))

beforeEach(async () => {
  folder = await mkdtemp(join(workshop, 'test-'))
  events = []
})
afterEach(() => rm(folder, { recursive: true }))

async function restore(
  request: Omit<RestoreRequest, 'backup'> & { backup?: string },
  onEvent: (event: VarveEvent) => void = event => void events.push(event),
  host: Host = new ImageHost({ instance: 'web-1', disks: {} }),
  signal?: AbortSignal,
): Promise<void> {
  const pipeline = new RestorePipeline({ host, storage, stateDir })
  await pipeline.run({ backup: manifest.id, ...request }, { onEvent, ...(signal && { signal }) })
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
  const recoverNow = () => recover({ stateDir, storages: [storage] })
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
    override instance(name: string): Promise<Instance> {
      return new ImageHost({ instance: name, disks: { vda: second } }).instance(name)
    }
  }
  const host = new MovingHost({ instance: 'web-1', disks: { vda: first } })
  const pipeline = new RestorePipeline({ host, storage, stateDir })
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
  const pipeline = new RestorePipeline({ host, storage: unsteady, stateDir })
  await pipeline.run({ backup: manifest.id, to: { newInstance: 'copy', directory: folder } })
  expect(tries).toHaveLength(2)
  expect(host.defined).toContain(join(folder, 'copy-vda.qcow2'))
})

/** What `size` bytes of a file begin with. */
async function headOf(path: string, size: number): Promise<Buffer> {
  await using file = await open(path)
  const { buffer } = await file.read(Buffer.alloc(size), 0, size, 0)
  return buffer
}

test('what a guest has written into its raw disk is not believed where the format of a target in place is guessed', async () => {
  const secret = join(folder, 'of the host')
  await writeFile(secret, 'untouched'.padEnd(SIZE, '.'))
  const before = await sha256File(secret)
  const header = join(folder, 'header')
  await execa('qemu-img', ['create', '-f', 'qcow2', '-o', `data_file=${secret}`, header, String(SIZE)])
  await writeFile(secret, 'untouched'.padEnd(SIZE, '.'))
  const target = join(folder, 'target')
  await createRaw(target, SIZE)
  await using raw = await open(target, 'r+')
  await raw.write(await headOf(header, 1024 * 1024))
  const guessed = { to: { disks: { vda: target } }, inPlace: true }
  const forged = await sha256File(target)
  await expect(restore(guessed)).rejects.toMatchObject({
    code: 'INVALID_ARGUMENT',
    message: expect.stringContaining('--format'),
  })
  const stated = { to: { ...guessed.to, format: 'qcow2' }, inPlace: true } as const
  await expect(restore(stated)).rejects.toMatchObject({
    code: 'DISK_UNSUPPORTED',
    context: { path: target, dataFile: secret },
  })
  const named = new ImageHost({ instance: 'web-1', disks: { vda: { path: target, format: 'qcow2' } } })
  const ofInstance = { to: { instance: 'web-1' }, inPlace: true }
  await expect(restore(ofInstance, undefined, named)).rejects.toMatchObject({ context: { dataFile: secret } })
  expect(await sha256File(target)).toBe(forged)
  await restore({ to: { ...guessed.to, format: 'raw' }, inPlace: true })
  expect(await sha256Content(target, 'raw')).toBe(wanted)
  expect(await sha256File(secret)).toBe(before)

  // One that names no other file may be what it looks like, a backing file may not.
  const plain = join(folder, 'plain')
  await createQcow2(plain, SIZE)
  await restore({ to: { disks: { vda: plain } }, inPlace: true })
  expect(await sha256Content(plain, 'qcow2')).toBe(wanted)
  await execa('qemu-img', ['create', '-f', 'qcow2', '-F', 'raw', '-b', secret, plain])
  const backed = { to: { disks: { vda: plain } }, inPlace: true }
  await expect(restore(backed)).rejects.toMatchObject({ code: 'INVALID_ARGUMENT' })
})

test('a block device is restored in place, as raw or as what is stated, and never replaced by a file', async () => {
  const file = join(folder, 'device')
  await createRaw(file, SIZE)
  const { stdout: device } = await execa('losetup', ['--find', '--show', file])
  try {
    const host = new ImageHost({ instance: 'web-3', disks: { vda: { path: device, format: 'raw' } } })
    await qemuIo(device, 'raw', ['write -P 0x22 2M 1M'])
    const full = await new BackupPipeline({ host, storage, stateDir }).run({ instance: 'web-3' })
    const content = await sha256Content(device, 'raw')
    await qemuIo(device, 'raw', ['write -P 0x33 0 4M'])
    const over = { backup: full.id, to: { instance: 'web-3' } }
    await expect(restore(over, undefined, host)).rejects.toMatchObject({
      code: 'INVALID_ARGUMENT',
      message: expect.stringMatching(/block device .*in place/),
    })
    const toPath = { to: { disks: { vda: device } } }
    await expect(restore({ to: { ...toPath.to, overwrite: true } })).rejects.toMatchObject({
      code: 'INVALID_ARGUMENT',
      message: expect.stringContaining('in place'),
    })
    await restore({ ...over, inPlace: true }, undefined, host)
    expect(await sha256Content(device, 'raw')).toBe(content)

    await restore({ ...toPath, inPlace: true })
    expect(await sha256Content(device, 'raw')).toBe(wanted)
    // A guest can make its disk look so, and an image on a device is as good.
    await execa('qemu-img', ['create', '-f', 'qcow2', device, String(SIZE / 2)])
    await expect(restore({ ...toPath, inPlace: true })).rejects.toMatchObject({
      code: 'INVALID_ARGUMENT',
      message: expect.stringContaining('--format'),
    })
    const small = { ...toPath, to: { ...toPath.to, format: 'qcow2' }, inPlace: true } as const
    await expect(restore(small)).rejects.toMatchObject({ code: 'TARGET_TOO_SMALL' })
    await restore({ to: { ...toPath.to, format: 'raw' }, inPlace: true })
    expect(await sha256Content(device, 'raw')).toBe(wanted)
  } finally {
    await execa('losetup', ['--detach', device])
  }
})

test('a restore to a new file that is given up leaves nothing', async () => {
  const given = new AbortController()
  const onEvent = (event: VarveEvent) => {
    if (event.type === 'progress') given.abort(new Error('enough'))
  }
  const to = { disks: { vda: join(folder, 'restored') } }
  await expect(restore({ to }, onEvent, undefined, given.signal)).rejects.toMatchObject({
    code: 'ABORTED',
    context: {},
    cause: new Error('enough'),
  })
  expect(await readdir(folder)).toEqual([])
  expect(await readdir(join(stateDir, 'runs'))).toEqual([])
})

test('a disk that a restore in place has left half written is not backed up, and told of, until it is restored', async () => {
  const disk = join(folder, 'disk')
  await createQcow2(disk, SIZE)
  await qemuIo(disk, 'qcow2', ['write -P 0x22 0 8M'])
  const host = new ImageHost({ instance: 'web-1', disks: { vda: { path: disk, format: 'qcow2' } } })
  const request = { to: { instance: 'web-1' }, inPlace: true }
  const backup = () => new BackupPipeline({ host, storage, stateDir }).run({ instance: 'web-1' })
  const recoverNow = () => recover({ stateDir, storages: [storage] })
  const before = await sha256File(disk)

  // Before the first write nothing is lost.
  const list = join(workshop, 'storage', 'web-1', manifest.chain, manifest.id, 'vda.blake3')
  const digests = await readFile(list)
  await writeFile(list, Buffer.from(digests.map(byte => byte ^ 1)))
  const failed = restore(request, undefined, host)
  await expect(failed).rejects.toMatchObject({ code: 'DIGEST_MISMATCH' })
  await expect(failed).rejects.not.toMatchObject({ context: { incomplete: ['vda'] } })
  await writeFile(list, digests)
  expect(await sha256File(disk)).toBe(before)
  expect(await recoverNow()).toEqual({ ok: true, runs: [] })

  await expect(restore(request, undefined, host, abortAtStep('write-in-place'))).rejects.toMatchObject({
    code: 'ABORTED',
    message: expect.stringContaining('neither the old nor the restored'),
    context: { incomplete: ['vda'] },
  })
  const incomplete = { ok: false, runs: [{ kind: 'restore', instance: 'web-1', outcome: 'incomplete' }] }
  for (const _ of ['at once', 'and for ever']) {
    expect(await recoverNow()).toMatchObject(incomplete)
    await expect(backup()).rejects.toMatchObject({ code: 'DISK_INCOMPLETE', context: { path: disk } })
  }
  await restore(request, undefined, host)
  expect(await sha256Content(disk, 'qcow2')).toBe(wanted)
  expect(await recoverNow()).toEqual({ ok: true, runs: [] })
  await backup()

  // What goes wrong after the last byte is told as that.
  const again = new AbortController()
  const atMark = (event: VarveEvent) => {
    if (event.type === 'stage' && event.stage === 'mark') again.abort(new Error('enough'))
  }
  await expect(restore(request, atMark, host, again.signal)).rejects.toMatchObject({
    code: 'ABORTED',
    message: expect.stringContaining('is restored in place, and whole'),
    context: { restored: ['vda'] },
  })
  expect(await sha256Content(disk, 'qcow2')).toBe(wanted)
  expect(await recoverNow()).toEqual({ ok: true, runs: [] })
})

/** Images of an instance that can be switched on and off. */
class Machine extends ImageHost {
  isOn = false

  override async instance(...args: Parameters<ImageHost['instance']>) {
    return { ...(await super.instance(...args)), running: this.isOn }
  }
  override async waitUntilOff(): Promise<boolean> {
    return !this.isOn
  }
  override async powerOff(): Promise<void> {
    this.isOn = false
  }
  override async start(): Promise<void> {
    this.isOn = true
  }
}

test('an instance is started after a restore where it ran right before, and is not switched off for one that cannot fit', async () => {
  const disk = join(folder, 'disk')
  await createQcow2(disk, SIZE)
  const disks = { vda: { path: disk, format: 'qcow2' } } as const
  const machine = new Machine({ instance: 'web-1', disks })
  const to = { instance: 'web-1' }
  for (const isOn of [true, false]) {
    machine.isOn = !isOn
    const changes = (event: VarveEvent) => {
      if (event.type === 'stage' && event.stage === 'write') machine.isOn = isOn
    }
    await restore({ to }, changes, machine)
    expect(machine.isOn).toBe(isOn)
  }

  await createQcow2(join(folder, 'small'), SIZE / 2)
  const small = { vda: { path: join(folder, 'small'), format: 'qcow2' } } as const
  const other = new Machine({ instance: 'web-1', disks: small })
  other.isOn = true
  await expect(restore({ to, inPlace: true }, undefined, other)).rejects.toMatchObject({
    code: 'TARGET_TOO_SMALL',
    context: { needed: SIZE, available: SIZE / 2 },
  })
  expect(stages()).not.toContain('power-off')
  expect(other.isOn).toBe(true)
})

test('an image that can hold no bitmap is restored in place without one', async () => {
  const disk = join(folder, 'disk')
  await execa('qemu-img', ['create', '-f', 'qcow2', '-o', 'compat=0.10', disk, String(SIZE)])
  const host = new ImageHost({ instance: 'web-1', disks: { vda: { path: disk, format: 'qcow2' } } })
  await restore({ to: { instance: 'web-1' }, inPlace: true }, undefined, host)
  expect(stages()).not.toContain('mark')
  expect(await sha256Content(disk, 'qcow2')).toBe(wanted)
})

test('a new instance is not restored in place', async () => {
  const to = { newInstance: 'copy', directory: folder }
  await expect(restore({ to, inPlace: true })).rejects.toMatchObject({
    code: 'INVALID_ARGUMENT',
    message: expect.stringContaining('--in-place'),
  })
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
  ['raw', 'as a backing file', 'replaced'],
  ['qcow2', 'as a backing file', 'written over'],
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
