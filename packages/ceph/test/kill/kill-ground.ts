import { mkdir, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { BackupPipeline, LibvirtHost, RestorePipeline } from '@varve/core'
import { LocalDriver } from '@varve/driver-local'
import { type LibvirtLab, startLibvirt } from '@varve/testkit/lab'
import { Random } from '../../../core/test/torture/random.ts'
import { CephConnector, type CephOptions } from '../../src/index.ts'
import { randomChange } from '../random-change.ts'
import { RbdSite } from '../rbd-site.ts'

export const INSTANCE = 'web-1'
export const DISKS = ['vda', 'vdb'] as const
export type DiskName = (typeof DISKS)[number]
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
    await writeFile(definition, domainXml(await site.ceph.monitor(), site.user.user, secret))
    await lab.virsh(['define', definition])
    await ground.start()
    return ground
  }

  image(disk: DiskName): string {
    return `vms/${INSTANCE}-${disk}`
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

  /** The guest writes, zeroes and trims at random, and flushes: through QEMU's own device, so that it need not boot. */
  async write(): Promise<void> {
    for (const [index, disk] of DISKS.entries()) {
      const device = `/machine/peripheral/virtio-disk${index}/virtio-backend`
      const commands = Array.from({ length: 3 }, () => randomChange(this.content[disk], this.random))
      const lines = [...commands, 'flush'].map(
        command => `qemu-monitor-command ${INSTANCE} --hmp 'qemu-io -d ${device} "${command}"'`,
      )
      const said = await this.#lab.virsh([lines.join('; ')])
      if (/failed|error|invalid|unknown|not found/i.test(said)) throw new Error(`qemu-io: ${said}`)
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

export function copied({ vda, vdb }: Content): Content {
  return { vda: Buffer.from(vda), vdb: Buffer.from(vdb) }
}

/** A domain that boots nothing: its firmware finds no boot sector, and halts. */
function domainXml(monitor: string, user: string, secret: string): string {
  const [host, port] = monitor.split(':')
  const disks = DISKS.map(
    disk => `
    <disk type='network' device='disk'>
      <driver name='qemu' type='raw' discard='unmap'/>
      <source protocol='rbd' name='vms/${INSTANCE}-${disk}'>
        <host name='${host}' port='${port}'/>
        <auth username='${user}'><secret type='ceph' uuid='${secret}'/></auth>
      </source>
      <target dev='${disk}' bus='virtio'/>
    </disk>`,
  )
  return `<domain type='qemu'>
  <name>${INSTANCE}</name>
  <memory unit='MiB'>32</memory>
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <on_poweroff>destroy</on_poweroff>
  <devices>${disks.join('')}
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    <video><model type='none'/></video>
  </devices>
</domain>
`
}
