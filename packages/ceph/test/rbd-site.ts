import type { RbdCluster } from '@varve/core'
import { type CephLab, type CephUser, startCeph } from '@varve/testkit/lab'
import { execa } from 'execa'
import { CephConnector } from '../src/index.ts'

/** A Ceph cluster with one pool, and a connection as a user that may use its images. */
export class RbdSite implements AsyncDisposable {
  readonly ceph: CephLab
  readonly user: CephUser
  readonly cluster: RbdCluster
  #images = 0

  private constructor(ceph: CephLab, user: CephUser) {
    this.ceph = ceph
    this.user = user
    this.cluster = new CephConnector({
      conf: ceph.conf,
      user: user.user,
      keyring: user.keyring,
    }).cluster()
  }

  static async start(): Promise<RbdSite> {
    const ceph = await startCeph({ capacity: 2 * 1024 ** 3 })
    try {
      const [user] = await Promise.all([ceph.createUser('varve'), ceph.createRbdPool('vms')])
      return new RbdSite(ceph, user)
    } catch (error) {
      await ceph[Symbol.asyncDispose]()
      throw error
    }
  }

  /** An image's name that no test has used, in no process: a lock on it counts on the whole machine. */
  newImage(): string {
    this.#images++
    return `vms/disk-${process.pid}-${this.#images}`
  }

  /** Makes an image of `size` bytes with options of `rbd create`. */
  async create(size: number, ...options: string[]): Promise<string> {
    const image = this.newImage()
    await this.ceph.run('rbd', 'create', image, '--size', `${size}B`, ...options)
    return image
  }

  /** Runs `qemu-io` on an image. Each command is one of its own, such as `write -P 7 0 4k`. */
  async write(image: string, ...commands: string[]): Promise<void> {
    const args = [...commands, 'flush'].flatMap(command => ['-c', command])
    const path = `rbd:${image}:conf=${this.ceph.conf}`
    const { stdout } = await execa('qemu-io', ['-d', 'unmap', '-f', 'raw', ...args, path])
    if (/error|failed/i.test(stdout)) throw new Error(stdout)
  }

  /** What an image holds at a snapshot, such as `vms/disk@one`, or now: by `rbd export`. */
  async bytes(image: string): Promise<Buffer> {
    const args = ['--conf', this.ceph.conf, 'export', '--no-progress', image, '-']
    const { stdout } = await execa('rbd', args, { encoding: 'buffer', maxBuffer: 1024 ** 3 })
    return Buffer.from(stdout)
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.ceph[Symbol.asyncDispose]()
  }
}
