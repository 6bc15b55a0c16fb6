import { mkdir, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { BackupPipeline, LibvirtHost, RestorePipeline } from '@varve/core'
import { LocalDriver } from '@varve/driver-local'
import { deviceIo, type LibvirtLab, startLibvirt } from '@varve/testkit/lab'
import { DISKS, type DiskName, domainXml, INSTANCE, randomChange } from '../../../core/test/torture/guest.ts'
import { Random } from '../../../core/test/torture/random.ts'
import { CephConnector, type CephOptions } from '../../src/index.ts'
import { RbdSite } from '../rbd-site.ts'

export type Content = Readonly<Record<DiskName, Buffer>>

/** Two objects and a part, which is no multiple of a cluster. */
const DISK_BYTES = 2 * 1024 * 1024 + 3 * 512

/** A libvirt domain with two RBD images, and beside each what it must hold: every write goes to a plain buffer too. */
export class KillGround implements AsyncDisposable {
  readonly site: RbdSite
  readonly folder: string
  readonly random: Random
  /** What the disks must hold now. */
  content: Content = { vda: Buffer.alloc(DISK_BYTES), vdb: Buffer.alloc(DISK_BYTES) }
  /** What each backup must hold, by its id. */
  readonly backups = new Map<string, Content>()
  readonly #lab: LibvirtLab

  private constructor(site: RbdSite, lab: LibvirtLab, folder: string, seed: number) {
    this.site = site
    this.#lab = lab
    this.folder = folder
    this.random = new Random(seed)
  }

  static async create(seed: number): Promise<KillGround> {
    const site = await RbdSite.start()
    const lab = await startLibvirt()
    const ground = new KillGround(site, lab, await mkdtemp(join(tmpdir(), 'varve-rbd-kill-')), seed)
    await mkdir(join(ground.folder, 'storage'))
    await mkdir(ground.temporary)
    for (const disk of DISKS) {
      const size = ['--size', `${DISK_BYTES}B`, '--object-size', '1M']
      await site.ceph.run('rbd', 'create', ground.image(disk), ...size)
    }
    const definition = join(ground.folder, 'domain.xml')
    const secret = await lab.defineCephSecret(site.user.secret)
    const disks = diskXml(site.ceph.monitor, site.user.user, secret)
    await writeFile(definition, domainXml(disks))
    await lab.virsh(['define', definition])
    await ground.start()
    return ground
  }

  image(disk: DiskName): string {
    return `vms/${imageName(disk)}`
  }
  get temporary(): string {
    return join(this.folder, 'tmp')
  }
  get stateDir(): string {
    return join(this.folder, 'state')
  }
  get storagePath(): string {
    return join(this.folder, 'storage')
  }
  get storage(): LocalDriver {
    return new LocalDriver({ path: this.storagePath })
  }
  /** How a host reaches images that no domain names. */
  get ceph(): CephOptions {
    const { ceph, user } = this.site
    return { conf: ceph.conf, user: user.user, keyring: user.keyring }
  }
  get host(): LibvirtHost {
    return new LibvirtHost({ uri: this.#lab.uri, rbd: new CephConnector(this.ceph) })
  }

  async state(): Promise<string> {
    return (await this.#lab.virsh(['domstate', INSTANCE])).trim()
  }

  async start(): Promise<void> {
    if ((await this.state()) === 'shut off') await this.#lab.virsh(['start', INSTANCE])
  }

  /** The guest writes, zeroes and trims at random, and flushes. */
  async write(): Promise<void> {
    for (const disk of DISKS) {
      const commands = Array.from({ length: 3 }, () => randomChange(this.content[disk], this.random))
      await deviceIo(this.#lab, INSTANCE, disk, [...commands, 'flush'])
    }
  }

  /** Backs up in this process and remembers what the backup must hold. */
  async backup() {
    const { host, storage, stateDir } = this
    const manifest = await new BackupPipeline({ host, storage, stateDir }).run({ instance: INSTANCE })
    this.remember(manifest.id)
    return manifest
  }

  remember(id: string): void {
    this.backups.set(id, copied(this.content))
  }

  /** What a restore of a backup gives. */
  async restored(id: string): Promise<Content> {
    const { host, storage, stateDir, folder } = this
    const disks = Object.fromEntries(DISKS.map(disk => [disk, join(folder, `restored-${disk}`)]))
    const pipeline = new RestorePipeline({ host, storage, stateDir })
    await pipeline.run({ backup: id, to: { disks, format: 'raw', overwrite: true } })
    const [vda, vdb] = await Promise.all(DISKS.map(disk => readFile(disks[disk] ?? '')))
    return { vda: vda ?? Buffer.alloc(0), vdb: vdb ?? Buffer.alloc(0) }
  }

  /** What the images hold, by `rbd export`. */
  async stored(): Promise<Content> {
    return {
      vda: await this.site.bytes(this.image('vda')),
      vdb: await this.site.bytes(this.image('vdb')),
    }
  }

  async images(): Promise<string[]> {
    return JSON.parse(await this.site.ceph.run('rbd', 'ls', 'vms', '--format', 'json'))
  }

  async snapshots(disk: DiskName): Promise<string[]> {
    const list = await this.site.ceph.run('rbd', 'snap', 'ls', this.image(disk), '--format', 'json')
    return JSON.parse(list).map(({ name }: { name: string }) => name)
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#lab.stop()
    await this.site[Symbol.asyncDispose]()
    await rm(this.folder, { recursive: true })
  }
}

/** A disk's image in the pool: another one in each process, as a lock on it counts on the whole machine. */
export function imageName(disk: DiskName): string {
  return `${INSTANCE}-${process.pid}-${disk}`
}

export function copied({ vda, vdb }: Content): Content {
  return { vda: Buffer.from(vda), vdb: Buffer.from(vdb) }
}

/** The disks of the domain. */
function diskXml(monitor: string, user: string, secret: string): string[] {
  const [host, port] = monitor.split(':')
  return DISKS.map(
    disk => `
    <disk type='network' device='disk'>
      <driver name='qemu' type='raw' discard='unmap'/>
      <source protocol='rbd' name='vms/${imageName(disk)}'>
        <host name='${host}' port='${port}'/>
        <auth username='${user}'><secret type='ceph' uuid='${secret}'/></auth>
      </source>
      <target dev='${disk}' bus='virtio'/>
    </disk>`,
  )
}
