import { copyFile, mkdir, mkdtemp, readdir, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { LocalDriver } from '@varve/driver-local'
import {
  createQcow2,
  createRaw,
  type LabDomain,
  type LabDomainOptions,
  type LibvirtLab,
  qemuIo,
  sha256Content,
  startLibvirt,
} from '@varve/testkit/lab'
import { afterAll, afterEach, beforeAll, beforeEach, expect } from 'vitest'
import { BackupPipeline, type BackupRequest } from '../src/backup-pipeline.ts'
import type { VarveEvent } from '../src/events.ts'
import { LibvirtHost } from '../src/libvirt-host.ts'
import type { BackupManifest } from '../src/manifest.ts'
import { RestorePipeline, type RestoreRequest, type RestoreResult } from '../src/restore-pipeline.ts'
import type { RunOptions } from '../src/run-options.ts'
import type { StoredObject } from '../src/storage.ts'
import { serversWith } from './torture/processes.ts'

export const MiB: number = 1024 * 1024

/** A local storage that lets a test do something in the middle of a backup. */
export class PausingStorage extends LocalDriver {
  /** Awaited before each object is written. */
  beforePut: ((key: string) => Promise<void>) | undefined

  override async put(...args: Parameters<LocalDriver['put']>): Promise<StoredObject> {
    await this.beforePut?.(args[0])
    return super.put(...args)
  }
}

/** A disk of the instance: an empty image, named after it. */
export interface SiteDisk {
  readonly target: string
  readonly size: number
  readonly format?: 'qcow2' | 'raw'
}

/** What the tests of a file share: a libvirt. Each of them, or the file, has a folder, a storage and one instance. */
export interface VmSite {
  readonly lab: LibvirtLab
  readonly folder: string
  readonly stateDir: string
  readonly storage: PausingStorage
  readonly storagePath: string
  readonly host: LibvirtHost
  /** Of every run so far. */
  readonly events: readonly VarveEvent[]
  /** Defines the instance of the test; it is removed with it. By default no guest boots in it. */
  createVm(disks: readonly SiteDisk[], options?: Partial<LabDomainOptions>): Promise<LabDomain>
  /** Where a disk of the instance is. */
  image(disk: string): string
  /** Where an object of a backup is stored. */
  stored(manifest: BackupManifest, name: string): string
  /** Backs the instance up. */
  backup(request?: Partial<BackupRequest>, run?: RunOptions): Promise<BackupManifest>
  restore(request: RestoreRequest, run?: RunOptions): Promise<RestoreResult>
  /** Reads what a disk of the instance is on, such as an overlay, by commands of `qemu-io`, also while it runs. */
  expectHolds(disk: string, ...reads: readonly string[]): Promise<void>
  /** SHA-256 of what is on a disk of the instance to which nobody writes, also while it runs. */
  content(disk: string): Promise<string>
  /** SHA-256 of a device as the guest reads it from the disk. */
  sum(device: string): Promise<string>
  /** Restores one disk to a new file and returns its path. */
  restored(manifest: BackupManifest, disk?: string): Promise<string>
  /** Restores to new files and returns the SHA-256 of what a guest would read in each. */
  restoredSums(manifest: BackupManifest): Promise<Record<string, string>>
  /** SHA-256 of what QEMU alone reads from each stored image and all that it rests on: much less work than a restore. */
  storedSums(manifest: BackupManifest): Promise<Record<string, string>>
  /** Reads a stored image, and all that it rests on, by commands of `qemu-io`. */
  expectStored(manifest: BackupManifest, reads: readonly string[], disk?: string): Promise<void>
  /**
   * The state of the host is as it was before: no overlay, no server, no open journal; one bitmap a storage.
   *
   * @param of the disks that have these bitmaps. Default: all
   */
  expectCleanHost(bitmaps: string[], of?: readonly string[]): Promise<void>
}

/**
 * To be called once in a test file.
 *
 * @param life whether the folder, the storage and the instance are made anew for each test. Default: they are
 */
export function useVmSite(life: 'test' | 'file' = 'test'): VmSite {
  let lab: LibvirtLab
  let folder: string
  let storage: PausingStorage
  let events: VarveEvent[]
  let vm: LabDomain | undefined
  let domains = 0
  const formats = new Map<string, 'qcow2' | 'raw'>()

  beforeAll(async () => {
    lab = await startLibvirt()
  })
  afterAll(() => lab.stop())
  const [begin, end] = life === 'file' ? [beforeAll, afterAll] : [beforeEach, afterEach]
  begin(async () => {
    folder = await mkdtemp(join(tmpdir(), 'varve-vm-'))
    await mkdir(site.storagePath)
    storage = new PausingStorage({ path: site.storagePath })
    events = []
    vm = undefined
  })
  end(async () => {
    await vm?.remove()
    await rm(folder, { recursive: true })
  })

  const theVm = (): LabDomain => vm ?? expect.fail('the test has no instance yet')
  const onEvent = (event: VarveEvent) => void events.push(event)
  const pipelines = () => ({ host: site.host, storage, stateDir: site.stateDir })

  const site: VmSite = {
    get lab() {
      return lab
    },
    get folder() {
      return folder
    },
    get stateDir() {
      return join(folder, 'state')
    },
    get storage() {
      return storage
    },
    get storagePath() {
      return join(folder, 'storage')
    },
    get host() {
      return new LibvirtHost({ uri: lab.uri })
    },
    get events() {
      return events
    },

    async createVm(disks, options = {}) {
      for (const { target, size, format = 'qcow2' } of disks) {
        formats.set(target, format)
        await (format === 'raw' ? createRaw : createQcow2)(site.image(target), size)
      }
      domains += 1
      vm = await lab.createDomain({
        name: `web-${domains}`,
        disks: disks.map(({ target, format = 'qcow2' }) => ({
          target,
          path: site.image(target),
          format,
          discard: 'unmap',
        })),
        guest: false,
        ...options,
      })
      return vm
    },

    image: disk => join(folder, disk),
    stored: ({ instance, chain, id }, name) => join(site.storagePath, instance.name, chain, id, name),

    backup: (request = {}, run = {}) =>
      new BackupPipeline(pipelines()).run({ instance: theVm().name, ...request }, { onEvent, ...run }),
    restore: (request, run = {}) => new RestorePipeline(pipelines()).run(request, { onEvent, ...run }),

    async expectHolds(disk, ...reads) {
      const { disks } = await site.host.disks(theVm().name)
      const path = disks.find(({ name }) => name === disk)?.path ?? expect.fail(`no ${disk}`)
      await qemuIo(path, formats.get(disk) ?? 'qcow2', reads, { isOpen: true })
    },

    async content(disk) {
      const copy = join(folder, `${disk}.copy`)
      await copyFile(site.image(disk), copy) // QEMU keeps others from the disk itself
      return sha256Content(copy, formats.get(disk) ?? 'qcow2')
    },

    async sum(device) {
      const { stdout } = await theVm().run(`sync; echo 3 > /proc/sys/vm/drop_caches; sha256sum ${device}`)
      return stdout.slice(0, 64)
    },

    async restored(manifest, disk = 'vda') {
      const path = join(await mkdtemp(join(folder, 'restored-')), disk)
      await site.restore({ backup: manifest.id, to: { disks: { [disk]: path } } })
      return path
    },

    async restoredSums(manifest) {
      const target = await mkdtemp(join(folder, 'restored-'))
      const disks = Object.fromEntries(
        manifest.disks.map(disk => [disk.name, join(target, `${disk.name}.qcow2`)]),
      )
      await site.restore({ backup: manifest.id, to: { disks } })
      const sums: Record<string, string> = {}
      for (const [name, path] of Object.entries(disks)) {
        sums[name] = await sha256Content(path, 'qcow2')
      }
      return sums
    },

    async storedSums(manifest) {
      const sums: Record<string, string> = {}
      for (const { name } of manifest.disks) {
        sums[name] = await sha256Content(site.stored(manifest, `${name}.qcow2`), 'qcow2')
      }
      return sums
    },

    async expectStored(manifest, reads, disk = 'vda') {
      await qemuIo(site.stored(manifest, `${disk}.qcow2`), 'qcow2', reads, { isOpen: true })
    },

    async expectCleanHost(bitmaps, of) {
      expect((await readdir(folder)).filter(name => name.includes('.varve-'))).toEqual([])
      expect(await readdir(join(site.stateDir, 'runs'))).toEqual([])
      const { disks } = await site.host.instance(theVm().name)
      for (const disk of disks) {
        expect(disk.path).toBe(site.image(disk.name))
        if (disk.format === 'qcow2' && (of?.includes(disk.name) ?? true))
          expect(disk.bitmaps.map(({ name }) => name).sort()).toEqual(bitmaps)
      }
      expect(serversWith(folder)).toEqual([])
    },
  }
  return site
}
