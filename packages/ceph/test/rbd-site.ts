import { once } from 'node:events'
import type { RbdCluster, RbdSnapshot } from '@varve/core'
import { type CephLab, type CephUser, startCeph } from '@varve/testkit/lab'
import { execa } from 'execa'
import { CephConnector } from '../src/index.ts'

/** A Ceph cluster with one pool, and a connection as a user that may use its images. */
export class RbdSite implements AsyncDisposable {
  readonly ceph: CephLab
  readonly user: CephUser
  /** The connection. */
  readonly rbd: CephConnector
  readonly cluster: RbdCluster
  /** Of all clusters of this process. */
  static #images = 0

  private constructor(ceph: CephLab, user: CephUser) {
    this.ceph = ceph
    this.user = user
    this.rbd = new CephConnector({ conf: ceph.conf, user: user.user, keyring: user.keyring })
    this.cluster = this.rbd.cluster()
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
    RbdSite.#images++
    return `vms/disk-${process.pid}-${RbdSite.#images}`
  }

  /** Makes an image of `size` bytes, with options of `rbd create`. */
  async create(size: number, ...options: string[]): Promise<string> {
    const image = this.newImage()
    if (options.length === 0) await this.ceph.client.create(image, size)
    else await this.ceph.run('rbd', 'create', image, '--size', `${size}B`, ...options)
    return image
  }

  /** Takes a snapshot as a backup does; returns it with its number. */
  async takeSnapshot(image: string, name: string): Promise<RbdSnapshot> {
    await this.cluster.createSnapshot(image, name)
    const taken = (await this.cluster.snapshots(image)).find(snapshot => snapshot.name === name)
    if (!taken) throw new Error(`${image} has no snapshot ${name}.`)
    return taken
  }

  /** Changes an image by commands of `qemu-io`, such as `write -P 7 0 4k`. */
  write(image: string, ...commands: string[]): Promise<void> {
    return this.ceph.client.write(image, commands)
  }

  /** What an image holds at a snapshot, such as `vms/disk@one`, or now: by Ceph's own library. */
  bytes(image: string): Promise<Buffer> {
    return this.ceph.client.read(image)
  }

  /** The snapshots of an image, the oldest first. */
  snapshots(image: string): Promise<string[]> {
    return this.ceph.client.snapshots(image)
  }

  /** A client that has an image open for writing until the end, as a virtual machine has. */
  async opened(image: string): Promise<AsyncDisposable> {
    const client = execa('qemu-io', ['-f', 'raw', `rbd:${image}:conf=${this.ceph.conf}`], {
      stdin: 'pipe',
      buffer: false,
    })
    await once(client.stdout, 'data') // its prompt
    return {
      async [Symbol.asyncDispose]() {
        client.stdin.end()
        await client
      },
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.ceph[Symbol.asyncDispose]()
  }
}
