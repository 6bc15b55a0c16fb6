import { execFileSync } from 'node:child_process'
import { readdirSync, readFileSync } from 'node:fs'
import { mkdir, mkdtemp, readdir, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { createQcow2, createRaw, mountTmpfs, type Tmpfs } from '@varve/testkit/lab'
import { afterAll, afterEach, beforeAll, expect, onTestFinished, test, vi } from 'vitest'
import { BackupPipeline } from '../src/backup-pipeline.ts'
import type { VarveEvent } from '../src/events.ts'
import { LibvirtHost } from '../src/libvirt-host.ts'
import type { StoredObject } from '../src/storage.ts'
import { MiB, PausingStorage, useVmSite } from './vm-site.ts'

let small: Tmpfs
let stuck: StuckFolder
// Before the lab, whose libvirt sees what was mounted when it started.
beforeAll(async () => {
  small = await mountTmpfs('size=24m')
  stuck = await StuckFolder.create()
})
afterAll(async () => {
  await stuck.dispose()
  await small.dispose()
})

const site = useVmSite()

/** Once the writers have ended, who were let go. */
async function unmount(folder: string): Promise<void> {
  await vi.waitFor(() => execFileSync('umount', [folder], { stdio: 'pipe' }), {
    timeout: 60_000,
    interval: 200,
  })
}

/** A folder on a device that can stop to take what is written: only who waits for that hangs, not who writes or reads. */
class StuckFolder {
  readonly path: string
  readonly #folder: string
  readonly #below: string
  stands = false

  private constructor(folder: string) {
    this.#folder = folder
    this.#below = join(folder, 'below')
    this.path = join(folder, 'above')
  }

  static async create(): Promise<StuckFolder> {
    const folder = await mkdtemp(join(tmpdir(), 'varve-stuck-'))
    const created = new StuckFolder(folder)
    await created.#mount(join(folder, 'device'), created.#below, 128 * MiB)
    // With a journal, whoever writes would wait for it sooner or later.
    await created.#mount(join(created.#below, 'device'), created.path, 96 * MiB, '-O', '^has_journal')
    return created
  }

  async #mount(device: string, folder: string, size: number, ...options: string[]): Promise<void> {
    await createRaw(device, size)
    execFileSync('mkfs.ext4', ['-q', ...options, device])
    await mkdir(folder)
    execFileSync('mount', ['-o', 'loop', device, folder])
  }

  stop(): void {
    execFileSync('fsfreeze', ['--freeze', this.#below])
    this.stands = true
  }

  goOn(): void {
    if (this.stands) execFileSync('fsfreeze', ['--unfreeze', this.#below])
    this.stands = false
  }

  async dispose(): Promise<void> {
    this.goOn()
    for (const mount of [this.path, this.#below]) await unmount(mount)
    await rm(this.#folder, { recursive: true })
  }
}

let storage: HangingStorage | undefined
// Before what the site removes, which takes threads as well.
afterEach(() => storage?.answer())
afterEach(() => stuck.goOn())

/** A file system whose writers hang in the kernel from the middle of the upload of two images on. */
class HangingStorage extends PausingStorage {
  readonly #mount: string
  readonly #begun = new Set<string>()
  #state: 'works' | 'hangs' | 'recovered' = 'works'

  constructor(mount: string) {
    super({ path: join(mount, 'storage') })
    this.#mount = mount
  }

  static async create(): Promise<HangingStorage> {
    const folder = await mkdtemp(join(tmpdir(), 'varve-hanging-'))
    const mount = join(folder, 'mount')
    await createRaw(join(folder, 'device'), 256 * MiB)
    execFileSync('mkfs.ext4', ['-q', join(folder, 'device')])
    await mkdir(mount)
    execFileSync('mount', ['-o', 'loop', join(folder, 'device'), mount])
    onTestFinished(async () => {
      await unmount(mount)
      await rm(folder, { recursive: true })
    })
    const created = new HangingStorage(mount)
    await mkdir(created.location)
    return created
  }

  override put(...[key, body, options = {}]: Parameters<PausingStorage['put']>): Promise<StoredObject> {
    if (!key.endsWith('.qcow2')) return super.put(key, body, options)
    const onProgress = (bytes: number) => {
      options.onProgress?.(bytes)
      this.#begun.add(key)
      if (this.#begun.size === 2 && this.#state === 'works') this.#hang()
    }
    return super.put(key, body, { ...options, onProgress })
  }

  /** Resolves once calls hang: by then nothing answers any more. */
  async hangs(): Promise<void> {
    await vi.waitUntil(() => this.#state === 'hangs' && hangingThreads() >= 2, { timeout: 60_000 })
  }

  /** Lets the writers go on. */
  answer(): void {
    if (this.#state === 'hangs') execFileSync('fsfreeze', ['--unfreeze', this.#mount])
    this.#state = 'recovered'
  }

  /** Lets the writers go on, and waits until they have removed what they had written. */
  async recovers(): Promise<void> {
    this.answer()
    await vi.waitUntil(async () => (await this.#files()).length === 1, { timeout: 60_000 })
    expect(await this.#files()).toEqual(['domain.xml']) // which was whole: prune removes it
  }

  async #files(): Promise<string[]> {
    const entries = await readdir(this.location, { recursive: true, withFileTypes: true })
    return entries.filter(entry => entry.isFile()).map(({ name }) => name)
  }

  #hang(): void {
    execFileSync('fsfreeze', ['--freeze', this.#mount])
    this.#state = 'hangs'
  }
}

/** How many threads of this process are in the kernel where no signal reaches them. */
function hangingThreads(): number {
  const states = readdirSync('/proc/self/task').map(id =>
    readFileSync(`/proc/self/task/${id}/stat`, 'latin1'),
  )
  return states.filter(state => /\) D /.test(state)).length
}

const SIZE = 32 * MiB

/** Begins a backup of two disks, and resolves once its storage hangs. */
async function beginBackup(options: {
  overlayFolder?: string
  overlayReserve?: number
  signal?: AbortSignal
}) {
  const { overlayFolder, overlayReserve, signal } = options
  const vm = await site.createVm(['vda', 'vdb'].map(target => ({ target, size: SIZE })))
  await vm.start()
  for (const disk of ['vda', 'vdb']) await vm.io(disk, `write -P 0x11 0 ${SIZE}`)
  storage = await HangingStorage.create()
  const host = new LibvirtHost({ uri: site.lab.uri, ...(overlayFolder && { overlayFolder }) })
  const pipeline = new BackupPipeline({ host, storage, stateDir: site.stateDir })
  const run = pipeline.run(
    {
      instance: vm.name,
      bandwidth: 16 * MiB, // so that both are in the middle of it
      ...(overlayReserve && { overlayReserve }),
    },
    { ...(signal && { signal }) },
  )
  run.catch(() => undefined)
  await storage.hangs()
  return { vm, run }
}

/** What becomes of a run within a minute; one that waits for the storage goes on. */
const soon = (run: Promise<unknown>): Promise<unknown> =>
  Promise.race([run, sleep(60_000, 'it goes on', { ref: false })])

test('a backup to a mount that hangs in the kernel can be given up, and the instance is on its disks', async () => {
  const giveUp = new AbortController()
  const { vm, run } = await beginBackup({ signal: giveUp.signal })
  await vm.io('vda', 'write -P 0x22 1M 4M')
  giveUp.abort()
  await expect(soon(run)).rejects.toMatchObject({ code: 'ABORTED' })
  expect(hangingThreads()).toBeGreaterThan(0) // until then, that is
  expect(await vm.state()).toBe('running')
  await site.expectCleanHost([])
  await site.expectHolds('vda', 'read -P 0x11 0 1M', 'read -P 0x22 1M 4M', 'read -P 0x11 5M 27M')
  await storage?.recovers()
})

test('while a storage hangs in the kernel, the room of the overlays is watched, and they are merged before it is gone', async () => {
  const overlays = { overlayFolder: small.path, overlayReserve: 16 * MiB }
  const { vm, run } = await beginBackup(overlays)
  await vm.io('vda', 'write -P 0x22 1M 12M')
  await expect(soon(run)).rejects.toMatchObject({
    code: 'OVERLAY_SPACE_LOW',
    context: { folder: small.path },
  })
  expect(hangingThreads()).toBeGreaterThan(0)
  expect(await vm.state()).toBe('running')
  await site.expectCleanHost([])
  expect(await readdir(small.path)).toEqual([])
  await site.expectHolds('vda', 'read -P 0x11 0 1M', 'read -P 0x22 1M 12M', 'read -P 0x11 13M 19M')
  await storage?.recovers()
})

test('a disk whose file system does not let it be on the disk for long keeps no backup from being given up before its overlay has no room', async () => {
  const path = join(stuck.path, 'vda')
  await createQcow2(path, 16 * MiB)
  const vm = await site.createVm([], { disks: [{ target: 'vda', path, format: 'qcow2' }] })
  const definition = join(site.folder, 'domain.xml')
  const xml = await site.lab.virsh(['dumpxml', '--inactive', vm.name])
  // QEMU leaves it to the kernel when what it writes is on the disk.
  await writeFile(definition, xml.replace("type='qcow2'", "type='qcow2' cache='unsafe'"))
  await site.lab.virsh(['define', definition])
  await vm.start()
  await vm.io('vda', `write -P 0x11 0 ${16 * MiB}`)
  const host = new LibvirtHost({ uri: site.lab.uri, overlayFolder: small.path })
  const pipeline = new BackupPipeline({ host, storage: site.storage, stateDir: site.stateDir })
  const onEvent = (event: VarveEvent) => {
    if (event.type === 'command' && event.args.includes('snapshot-create-as')) stuck.stop()
  }
  const run = pipeline.run({ instance: vm.name, overlayReserve: 16 * MiB }, { onEvent })
  run.catch(() => undefined)
  await vi.waitUntil(() => stuck.stands && hangingThreads() > 0, { timeout: 60_000 })
  await vm.io('vda', 'write -P 0x22 1M 12M')
  await expect(soon(run)).rejects.toMatchObject({
    code: 'OVERLAY_SPACE_LOW',
    context: { folder: small.path },
  })
  expect(hangingThreads()).toBeGreaterThan(0)
  expect(await vm.state()).toBe('running')
  expect(await readdir(small.path)).toEqual([])
  expect((await site.host.disks(vm.name)).disks).toMatchObject([{ path }])
  await site.expectHolds('vda', 'read -P 0x11 0 1M', 'read -P 0x22 1M 12M', 'read -P 0x11 13M 3M')
})
