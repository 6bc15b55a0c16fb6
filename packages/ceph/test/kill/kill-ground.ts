import { mkdir, readdir, readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { BackupPipeline, type Host, ImageHost, RestorePipeline, type StorageDriver } from '@varve/core'
import { LocalDriver } from '@varve/driver-local'
import { S3Driver } from '@varve/driver-s3'
import { createQcow2, deviceIo, type LibvirtLab } from '@varve/testkit/lab'
import { execa } from 'execa'
import { DISKS, type DiskName, domainXml, randomChange } from '../../../core/test/torture/guest.ts'
import { AgentHost, type StoragePlace } from '../../../core/test/torture/job.ts'
import type { Random } from '../../../core/test/torture/random.ts'
import { CephConnector } from '../../src/index.ts'
import type { RbdSite } from '../rbd-site.ts'
import type { KillLab } from './kill-lab.ts'

/**
 * What an instance is: a running domain on two RBD images, or one that is off; one on an RBD image and a qcow2 file; two
 * RBD images that no libvirt knows, whose backups go to S3.
 */
export const INSTANCES = ['domain', 'off', 'mixed', 'images'] as const
export type InstanceKind = (typeof INSTANCES)[number]

export type Content = Readonly<Record<DiskName, Buffer>>

/** Two objects and a part, which is no multiple of a cluster. */
const DISK_BYTES = 2 * 1024 * 1024 + 3 * 512

/** What a ground is made of. */
interface Parts {
  readonly lab: KillLab
  readonly kind: InstanceKind
  readonly random: Random
  /** The libvirt of a domain. */
  readonly libvirt?: LibvirtLab
  readonly storagePlace: StoragePlace
}

/** An instance with two disks, and beside each what it must hold: every write goes to a plain buffer too. */
export class KillGround implements AsyncDisposable {
  /** What the disks must hold now. */
  content: Content = { vda: Buffer.alloc(DISK_BYTES), vdb: Buffer.alloc(DISK_BYTES) }
  /** What each backup must hold, by its id. */
  readonly backups = new Map<string, Content>()
  readonly host: Host
  readonly storage: StorageDriver
  readonly storagePlace: StoragePlace
  readonly #lab: KillLab
  readonly #kind: InstanceKind
  readonly #random: Random
  readonly #libvirt: LibvirtLab | undefined

  private constructor({ lab, kind, random, libvirt, storagePlace }: Parts) {
    this.#lab = lab
    this.#kind = kind
    this.#random = random
    this.#libvirt = libvirt
    this.storagePlace = storagePlace
    this.storage =
      typeof storagePlace === 'string' ? new LocalDriver({ path: storagePlace }) : new S3Driver(storagePlace)
    this.host = libvirt
      ? new AgentHost(libvirt.uri, this.frozenFlag, lab.ceph)
      : new ImageHost({
          instance: this.instance,
          disks: { vda: this.path('vda'), vdb: this.path('vdb') },
          rbd: new CephConnector(lab.ceph),
        })
  }

  /** Makes the instance, and its first backup. */
  static async create(lab: KillLab, kind: InstanceKind, random: Random): Promise<KillGround> {
    const folder = join(lab.folder, kind)
    await mkdir(join(folder, 'disks'), { recursive: true })
    const libvirt = kind === 'images' ? undefined : await lab.libvirt()
    const storagePlace = kind === 'images' ? await lab.bucket() : join(folder, 'storage')
    if (typeof storagePlace === 'string') await mkdir(storagePlace)
    const ground = new KillGround({
      lab,
      kind,
      random,
      storagePlace,
      ...(libvirt && { libvirt: libvirt.lab }),
    })
    for (const disk of DISKS) await ground.#createDisk(disk)
    if (libvirt) await ground.#define(libvirt.secret)
    await ground.write()
    await ground.backup()
    return ground
  }

  /** With a digit: the points of commands are named by the words without one. */
  get instance(): string {
    return `web1-${this.#kind}`
  }
  get folder(): string {
    return join(this.#lab.folder, this.#kind)
  }
  get stateDir(): string {
    return join(this.folder, 'state')
  }
  /** Where the stand-in for the guest agent keeps whether the guest is frozen. */
  get frozenFlag(): string {
    return join(this.folder, 'agent')
  }

  /** The name of a disk's image in the pool: another one in each process, as a lock on it counts on the whole machine. */
  imageName(disk: DiskName): string {
    return `${this.instance}-${process.pid}-${disk}`
  }

  /** A disk's path, as hosts and manifests know it. */
  path(disk: DiskName): string {
    if (this.#kind === 'mixed' && disk === 'vdb') return join(this.folder, 'disks', 'vdb.qcow2')
    return `rbd:vms/${this.imageName(disk)}`
  }

  /** The path of a copy of a disk, of its kind. */
  copyPath(disk: DiskName): string {
    const path = this.path(disk)
    return path.startsWith('rbd:') ? `rbd:vms/copy-${this.imageName(disk)}` : `${path}.copy`
  }

  /** The names of its disks' images. */
  get images(): string[] {
    return DISKS.filter(disk => this.path(disk).startsWith('rbd:')).map(disk => this.imageName(disk))
  }

  /** The state that the domain is to be in; undefined for images, which do not run. */
  get wantedState(): 'running' | 'shut off' | undefined {
    if (this.#kind === 'images') return undefined
    return this.#kind === 'off' ? 'shut off' : 'running'
  }

  /** Undefined for images, which do not run. */
  async state(): Promise<string | undefined> {
    return (await this.#libvirt?.virsh(['domstate', this.instance]))?.trim()
  }

  async start(): Promise<void> {
    if (this.wantedState === 'running' && (await this.state()) === 'shut off')
      await this.#libvirt?.virsh(['start', this.instance])
  }

  /** The guest writes, zeroes and trims at random, and flushes. */
  async write(): Promise<void> {
    const changes = DISKS.map(disk => {
      const commands = Array.from({ length: 3 }, () => randomChange(this.content[disk], this.#random))
      return { disk, commands }
    })
    await Promise.all(
      changes.map(({ disk, commands }) =>
        this.#libvirt && this.wantedState === 'running'
          ? deviceIo(this.#libvirt, this.instance, disk, [...commands, 'flush'])
          : this.#lab.site.write(`vms/${this.imageName(disk)}`, ...commands),
      ),
    )
  }

  /** Backs up in this process and remembers what the backup must hold. */
  async backup(type: 'auto' | 'full' = 'auto') {
    const { host, storage, stateDir, instance } = this
    const manifest = await new BackupPipeline({ host, storage, stateDir }).run({ instance, type })
    this.backups.set(manifest.id, copied(this.content))
    return manifest
  }

  /** What a restore of a backup gives. */
  async restored(id: string): Promise<Content> {
    const { host, storage, stateDir, folder } = this
    const path = (disk: DiskName) => join(folder, `restored-${id}-${disk}`)
    const pipeline = new RestorePipeline({ host, storage, stateDir })
    const disks = { vda: path('vda'), vdb: path('vdb') }
    await pipeline.run({ backup: id, to: { disks, format: 'raw', overwrite: true } })
    return { vda: await readFile(disks.vda), vdb: await readFile(disks.vdb) }
  }

  /** What the disks hold. */
  async stored(): Promise<Content> {
    const [vda, vdb] = await Promise.all([this.bytes(this.path('vda')), this.bytes(this.path('vdb'))])
    return { vda, vdb }
  }

  /** What an image holds, by Ceph's own library, or a qcow2 file, by `qemu-img`; also while a domain runs on it. */
  async bytes(path: string): Promise<Buffer> {
    if (path.startsWith('rbd:')) return this.#lab.site.bytes(path.slice(4))
    const raw = join(this.folder, 'raw')
    await execa('qemu-img', ['convert', '-U', '-f', 'qcow2', '-O', 'raw', path, raw])
    return readFile(raw)
  }

  /** The backups of which the disks have bitmaps or snapshots. */
  async marked(): Promise<string[]> {
    const marks = await Promise.all(DISKS.map(disk => this.#marks(disk)))
    return marks.flat().map(name => name.replace('varve-', ''))
  }

  /** The files beside the disks. */
  files(): Promise<string[]> {
    return readdir(join(this.folder, 'disks'))
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (this.storage instanceof S3Driver) await this.storage[Symbol.asyncDispose]()
  }

  async #marks(disk: DiskName): Promise<string[]> {
    const path = this.path(disk)
    if (path.startsWith('rbd:')) return this.#lab.site.snapshots(path.slice(4))
    const { disks } = await this.host.instance(this.instance) // QEMU stores the newest bitmaps in the file when it ends
    return disks.flatMap(disk => ('bitmaps' in disk ? disk.bitmaps.map(({ name }) => name) : []))
  }

  async #createDisk(disk: DiskName): Promise<void> {
    const path = this.path(disk)
    if (!path.startsWith('rbd:')) return createQcow2(path, DISK_BYTES)
    const size = ['--size', `${DISK_BYTES}B`, '--object-size', '1M']
    await this.#lab.site.ceph.run('rbd', 'create', path.slice(4), ...size)
  }

  async #define(secret: string): Promise<void> {
    const { site } = this.#lab
    const definition = join(this.folder, 'domain.xml')
    const disks = DISKS.map(disk => diskXml(disk, this.path(disk), site, secret))
    await writeFile(definition, domainXml(disks, this.instance))
    await this.#libvirt?.virsh(['define', definition])
    await this.start()
  }
}

export function copied({ vda, vdb }: Content): Content {
  return { vda: Buffer.from(vda), vdb: Buffer.from(vdb) }
}

/** A disk of a domain. */
function diskXml(disk: DiskName, path: string, { ceph, user }: RbdSite, secret: string): string {
  const isRbd = path.startsWith('rbd:')
  const [host, port] = ceph.monitor.split(':')
  const source = isRbd
    ? `<source protocol='rbd' name='${path.slice(4)}'>
        <host name='${host}' port='${port}'/>
        <auth username='${user.user}'><secret type='ceph' uuid='${secret}'/></auth>
      </source>`
    : `<source file='${path}'/>`
  return `
    <disk type='${isRbd ? 'network' : 'file'}' device='disk'>
      <driver name='qemu' type='${isRbd ? 'raw' : 'qcow2'}' discard='unmap'/>
      ${source}
      <target dev='${disk}' bus='virtio'/>
    </disk>`
}
