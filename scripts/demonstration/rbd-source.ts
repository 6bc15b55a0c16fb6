import { join } from 'node:path'
import { CephConnector } from '@varve/ceph'
import { type CephLab, type DiskImage, type LabDisk, type LibvirtLab, startCeph } from '@varve/testkit/lab'
import type { Source } from './source.ts'

const POOL = 'vms'

/** RBD images of a Ceph cluster that is started for them. */
export class RbdSource implements Source {
  readonly title = 'RBD images of a one-node Ceph cluster'
  readonly plainTool = 'rbd import-diff'
  readonly connector: { readonly rbd: CephConnector }
  readonly #ceph: CephLab
  readonly #rbd: LabDisk['rbd']

  private constructor(ceph: CephLab, connector: CephConnector, rbd: LabDisk['rbd']) {
    this.connector = { rbd: connector }
    this.#ceph = ceph
    this.#rbd = rbd
  }

  /** Starts the cluster; libvirt, where there is one, gets the key of its user. */
  static async start(lab?: LibvirtLab): Promise<RbdSource> {
    const ceph = await startCeph()
    try {
      await ceph.createRbdPool(POOL)
      const { user, keyring, secret } = await ceph.createUser('varve')
      const connector = new CephConnector({ conf: ceph.conf, user, keyring })
      const rbd = lab && {
        monitor: ceph.monitor,
        user,
        secretUuid: await lab.defineCephSecret(secret),
      }
      return new RbdSource(ceph, connector, rbd)
    } catch (error) {
      await ceph[Symbol.asyncDispose]()
      throw error
    }
  }

  async create(image: string, size: number): Promise<void> {
    await this.#ceph.run('rbd', 'create', '--size', `${size}B`, `${POOL}/${image}`)
  }

  path(image: string): string {
    return `rbd:${POOL}/${image}`
  }

  open(image: string): DiskImage {
    return { path: `${this.path(image)}:conf=${this.#ceph.conf}`, format: 'raw' }
  }

  labDisk(image: string): LabDisk {
    if (!this.#rbd) throw new Error('There is no libvirt that knows the cluster.')
    return { target: image, path: `${POOL}/${image}`, format: 'raw', discard: 'unmap', rbd: this.#rbd }
  }

  async check(): Promise<void> {
    // raw content has nothing of its own that could be damaged
  }

  async restorePlainly(
    disk: string,
    folders: readonly string[],
    image: string,
    signal: AbortSignal,
  ): Promise<void> {
    await this.create(image, 0) // import-diff gives it its size
    for (const folder of folders) {
      signal.throwIfAborted()
      const stream = join(folder, `${disk}.rbd-diff`)
      await this.#ceph.run('rbd', 'import-diff', '--no-progress', stream, `${POOL}/${image}`)
    }
  }

  /** Images of Varve's own, and all but the newest two of its snapshots. */
  async leftovers(): Promise<string[]> {
    const images: string[] = JSON.parse(await this.#ceph.run('rbd', 'ls', POOL, '--format=json'))
    const left = images.filter(image => image.includes('varve'))
    for (const image of ['vda', 'vdb']) {
      const list = await this.#ceph.run('rbd', 'snap', 'ls', `${POOL}/${image}`, '--format=json')
      const names = (JSON.parse(list) as { name: string }[]).map(({ name }) => `${image}@${name}`)
      left.push(...names.slice(0, -2))
    }
    return left
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#ceph[Symbol.asyncDispose]()
  }
}
