import { mkdir, mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { S3DriverOptions } from '@varve/driver-s3'
import { type LibvirtLab, type RadosgwLab, startLibvirt, startRadosgw } from '@varve/testkit/lab'
import { TestBucket } from '../../../driver-s3/test/s3-target.ts'
import type { CephOptions } from '../../src/index.ts'
import { RbdSite } from '../rbd-site.ts'

/** A libvirt, and its secret with which domains reach the cluster. */
interface Libvirt {
  readonly lab: LibvirtLab
  readonly secret: string
}

/** A Ceph cluster, and a libvirt and an S3 gateway, which start when they are asked for. */
export class KillLab implements AsyncDisposable {
  readonly site: RbdSite
  readonly folder: string
  #libvirt: Promise<Libvirt> | undefined
  #gateway: RadosgwLab | undefined

  private constructor(site: RbdSite, folder: string) {
    this.site = site
    this.folder = folder
  }

  static async start(): Promise<KillLab> {
    const site = await RbdSite.start()
    const lab = new KillLab(site, await mkdtemp(join(tmpdir(), 'varve-rbd-kill-')))
    await mkdir(lab.temporary)
    return lab
  }

  /** For the victims' temporary files. */
  get temporary(): string {
    return join(this.folder, 'tmp')
  }

  /** How a host reaches images that no domain names. */
  get ceph(): CephOptions {
    const { ceph, user } = this.site
    return { conf: ceph.conf, user: user.user, keyring: user.keyring }
  }

  libvirt(): Promise<Libvirt> {
    this.#libvirt ??= startLibvirt().then(async lab => {
      return { lab, secret: await lab.defineCephSecret(this.site.user.secret) }
    })
    return this.#libvirt
  }

  /** An empty bucket. To be asked for once. */
  async bucket(): Promise<S3DriverOptions> {
    this.#gateway = await startRadosgw(this.site.ceph)
    return (await TestBucket.make(this.#gateway, await this.#gateway.createUser('kill'))).options
  }

  /** The images in the pool, sorted. */
  images(): Promise<string[]> {
    return this.site.ceph.client.list('vms')
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await (await this.#libvirt)?.lab.stop()
    await this.#gateway?.[Symbol.asyncDispose]()
    await this.site[Symbol.asyncDispose]()
    await rm(this.folder, { recursive: true })
  }
}
