import { existsSync } from 'node:fs'
import { cp, mkdir, mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { LocalDriver } from '@varve/driver-local'
import { createQcow2, deviceIo, type LibvirtLab, qemuIo } from '@varve/testkit/lab'
import { execa } from 'execa'
import { BackupPipeline, type BackupRequest } from '../../src/backup-pipeline.ts'
import type { Host } from '../../src/host.ts'
import { ImageHost } from '../../src/image-host.ts'
import type { BackupManifest } from '../../src/manifest.ts'
import { RestorePipeline } from '../../src/restore-pipeline.ts'
import { adoptMarks } from '../adopt-marks.ts'
import { type ChangeKind, DISKS, type DiskName, domainXml, INSTANCE, randomChange } from './guest.ts'
import { AgentHost } from './job.ts'
import type { Random } from './random.ts'

/** No multiple of a cluster: the last one is a part. */
export const DISK_BYTES: number = 4 * 1024 * 1024 + 3 * 512

/** What disks hold, byte for byte, by disk. */
export type Content = Readonly<Record<string, Buffer>>

/** The two storages: backups go to the first, and the second one's chain must not suffer from that. */
export type StorageName = 'first' | 'second'

/** What a template remembers beside its files. */
interface Memory {
  readonly content: Content
  readonly backups: ReadonlyMap<string, Content>
  readonly backing: string | undefined
}

/**
 * One instance with two disks, two storages, and beside each disk what it must hold: a plain buffer that every
 * write of the "guest" goes to as well. Without a libvirt the disks are plain images. A running domain boots
 * nothing: its writes are done by QEMU's own `qemu-io`, through the device, and cost no boot.
 */
export class ProvingGround implements AsyncDisposable {
  readonly folder: string
  /** What each backup must hold, by its id. */
  readonly backups = new Map<string, Content>()
  readonly #lab: LibvirtLab | undefined
  readonly #content = new Map<DiskName, Buffer>()
  readonly #templates = new Map<string, Memory>()
  /** The backing file of the first disk, where the domain's definition names one. */
  #backing: string | undefined
  /** What a backing file holds, which no run may change. */
  #backingBytes: Buffer | undefined

  private constructor(folder: string, lab: LibvirtLab | undefined) {
    this.folder = folder
    this.#lab = lab
  }

  static async create(lab?: LibvirtLab): Promise<ProvingGround> {
    // In memory where there is room: what is cut short are processes, and a disk would only be slower.
    const place = existsSync('/dev/shm') ? '/dev/shm' : tmpdir()
    const ground = new ProvingGround(await mkdtemp(join(place, 'varve-torture-')), lab)
    await mkdir(ground.temporary)
    return ground
  }

  /** Where the instance's files are. */
  get work(): string {
    return join(this.folder, 'work')
  }
  /** For the victims' temporary files. */
  get temporary(): string {
    return join(this.folder, 'tmp')
  }
  get stateDir(): string {
    return join(this.work, 'state')
  }
  get frozenFlag(): string {
    return join(this.work, 'agent')
  }
  get hasDomain(): boolean {
    return this.#lab !== undefined
  }
  image(disk: DiskName): string {
    return join(this.work, `${disk}.qcow2`)
  }
  storagePath(name: StorageName): string {
    return join(this.work, name)
  }
  storage(name: StorageName): LocalDriver {
    return new LocalDriver({ path: this.storagePath(name) })
  }
  get host(): Host {
    if (this.#lab) return new AgentHost(this.#lab.uri, this.frozenFlag)
    const disks = DISKS.map(disk => [disk, { path: this.image(disk), format: 'qcow2' }] as const)
    return new ImageHost({ instance: INSTANCE, disks: Object.fromEntries(disks) })
  }
  get virshUri(): string {
    return this.#lab?.uri ?? ''
  }

  /** What the disks must hold now. */
  get content(): Content {
    return Object.fromEntries([...this.#content].map(([disk, bytes]) => [disk, Buffer.from(bytes)]))
  }
  set content(content: Content) {
    for (const disk of DISKS) {
      const bytes = content[disk]
      if (bytes) this.#content.set(disk, Buffer.from(bytes))
    }
  }

  /** Begins anew: empty disks, empty storages, the instance off. */
  async clear(): Promise<void> {
    await this.#remove()
    for (const folder of ['first', 'second', 'state'])
      await mkdir(join(this.work, folder), { recursive: true })
    for (const disk of DISKS) {
      await createQcow2(this.image(disk), DISK_BYTES)
      this.#content.set(disk, Buffer.alloc(DISK_BYTES))
    }
    this.#backing = undefined
    await this.#define()
  }

  /** Puts a backing file under the first disk, which holds what it held, and names it in the domain's definition. */
  async putOnBacking(): Promise<void> {
    const backing = join(this.folder, 'backing.qcow2')
    await createQcow2(backing, DISK_BYTES)
    await qemuIo(backing, 'qcow2', [`write -P 0x5a 0 ${DISK_BYTES}`])
    const options = ['-f', 'qcow2', '-F', 'qcow2', '-b', backing]
    await execa('qemu-img', ['rebase', ...options, this.image('vda')])
    this.#backing = backing
    this.#backingBytes = await readFile(backing)
    await this.#lab?.virsh(['undefine', INSTANCE])
    await this.#define()
  }

  /** Rejects where the backing file was written to: other instances would rest on it too. */
  async expectBackingUntouched(): Promise<void> {
    if (this.#backing === undefined || !this.#backingBytes) return
    if (!(await readFile(this.#backing)).equals(this.#backingBytes))
      throw new Error('the backing file was written to')
  }

  /** Remembers the state under a name; the instance is off. */
  async save(name: string): Promise<void> {
    await cp(this.work, this.#template(name), { recursive: true })
    this.#templates.set(name, {
      content: this.content,
      backups: new Map(this.backups),
      backing: this.#backing,
    })
  }

  /** Brings a remembered state back. */
  async load(name: string): Promise<void> {
    const memory = this.#templates.get(name)
    if (!memory) throw new Error(`no template ${name}`)
    await this.#remove()
    await cp(this.#template(name), this.work, { recursive: true })
    for (const disk of DISKS) await adoptMarks(disk, this.image(disk))
    this.content = memory.content
    for (const [id, content] of memory.backups) this.backups.set(id, content)
    this.#backing = memory.backing
    await this.#define()
  }

  /** As libvirt tells it, such as `running` and `paused`; `off` also for plain images. */
  async state(): Promise<string> {
    const lab = this.#lab
    if (!lab) return 'off'
    const state = (await lab.virsh(['domstate', INSTANCE])).trim()
    return state === 'shut off' || state === 'crashed' ? 'off' : state
  }

  async start(): Promise<void> {
    if ((await this.state()) === 'off') await this.#lab?.virsh(['start', INSTANCE])
  }

  async stop(): Promise<void> {
    if ((await this.state()) !== 'off') await this.#lab?.virsh(['destroy', INSTANCE])
  }

  /** Ends QEMU with SIGKILL: its bitmaps are not stored. */
  async killQemu(): Promise<void> {
    const { stdout } = await execa('pgrep', ['-f', `guest=${INSTANCE},.*${this.folder}`])
    process.kill(Number(stdout), 'SIGKILL')
    while ((await this.state()) === 'running');
  }

  /** The guest writes, zeroes and trims at random; with the instance off, its disks are written to. */
  async write(random: Random, kinds?: readonly ChangeKind[]): Promise<void> {
    const running = (await this.state()) === 'running'
    for (const disk of DISKS) {
      const content = this.#content.get(disk)
      if (!content) continue
      const commands = Array.from({ length: 3 }, () => randomChange(content, random, kinds))
      if (running && this.#lab) await deviceIo(this.#lab, INSTANCE, disk, [...commands, 'flush'])
      else await qemuIo(this.image(disk), 'qcow2', commands)
    }
  }

  /** Makes a disk larger or smaller, be it in use or not. */
  async resize(disk: DiskName, size: number): Promise<void> {
    const content = this.#content.get(disk) ?? Buffer.alloc(0)
    if ((await this.state()) === 'running')
      await this.#lab?.virsh(['blockresize', INSTANCE, disk, `${size}B`])
    else await execa('qemu-img', ['resize', '-f', 'qcow2', '--shrink', this.image(disk), String(size)])
    const resized = Buffer.alloc(size)
    content.copy(resized)
    this.#content.set(disk, resized)
  }

  /** Backs up in this process, and remembers what the backup must hold. */
  async backup(name: StorageName, request: Partial<BackupRequest> = {}): Promise<BackupManifest> {
    const pipeline = new BackupPipeline({
      host: this.host,
      storage: this.storage(name),
      stateDir: this.stateDir,
    })
    const manifest = await pipeline.run({ instance: INSTANCE, ...request })
    this.remember(manifest.id, request.disks)
    return manifest
  }

  /** A backup holds what the disks hold now that were asked for, whatever its manifest says. */
  remember(id: string, disks: BackupRequest['disks'] = 'all', content: Content = this.content): void {
    const asked = Object.entries(content).filter(([name]) => disks === 'all' || disks.includes(name))
    this.backups.set(id, Object.fromEntries(asked))
  }

  /** What a restore of a backup gives. */
  async restored(name: StorageName, manifest: BackupManifest): Promise<Content> {
    const folder = await mkdtemp(join(this.folder, 'restored-'))
    const disks = Object.fromEntries(manifest.disks.map(disk => [disk.name, join(folder, disk.name)]))
    const pipeline = new RestorePipeline({
      host: this.host,
      storage: this.storage(name),
      stateDir: this.stateDir,
    })
    await pipeline.run({ backup: manifest.id, to: { disks, format: 'raw' } })
    const content: Record<string, Buffer> = {}
    for (const [disk, path] of Object.entries(disks)) content[disk] = await readFile(path)
    await rm(folder, { recursive: true })
    return content
  }

  /** What the images of the disks hold; the instance is off. */
  async stored(): Promise<Content> {
    const content: Record<string, Buffer> = {}
    for (const disk of DISKS) {
      const path = join(this.folder, 'raw')
      await execa('qemu-img', ['convert', '-f', 'qcow2', '-O', 'raw', this.image(disk), path])
      content[disk] = await readFile(path)
    }
    return content
  }

  /** The files of the instance's folder, its storages left out. */
  async files(): Promise<string[]> {
    const names = await readdir(this.work)
    return names.filter(name => !['first', 'second', 'state', 'agent'].includes(name)).sort()
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#remove()
    await rm(this.folder, { recursive: true })
  }

  #template(name: string): string {
    return join(this.folder, `template-${name}`)
  }

  async #remove(): Promise<void> {
    if (this.#lab && (await this.#lab.virsh(['list', '--all', '--name'])).split('\n').includes(INSTANCE)) {
      await this.stop()
      await this.#lab.virsh(['undefine', INSTANCE])
    }
    await rm(this.work, { recursive: true, force: true })
    await rm(this.temporary, { recursive: true })
    await mkdir(this.temporary)
  }

  async #define(): Promise<void> {
    if (!this.#lab) return
    const path = join(this.folder, 'domain.xml')
    const backing = (disk: DiskName) => (disk === 'vda' ? this.#backing : undefined)
    const disks = DISKS.map(disk => diskXml(disk, this.image(disk), backing(disk)))
    await writeFile(path, domainXml(disks))
    await this.#lab.virsh(['define', path])
  }
}

/** A disk of the domain. */
function diskXml(disk: DiskName, path: string, backing: string | undefined): string {
  const backingStore =
    backing === undefined
      ? ''
      : `<backingStore type='file'><format type='qcow2'/><source file='${backing}'/></backingStore>`
  return `
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' discard='unmap'/>
      <source file='${path}'/>${backingStore}
      <target dev='${disk}' bus='virtio'/>
    </disk>`
}
