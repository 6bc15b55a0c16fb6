import { mkdtemp, readFile } from 'node:fs/promises'
import { join } from 'node:path'
import {
  type BackupManifest,
  BackupPipeline,
  type BackupRequest,
  ChainManager,
  type Host,
  ImageHost,
  type RbdCluster,
  type RbdConnector,
  RestorePipeline,
  type RestoreRequest,
  type RestoreResult,
  type RunOptions,
  type VarveEvent,
} from '@varve/core'
import { LocalDriver } from '@varve/driver-local'
import { checkQcow2 } from '@varve/testkit/lab'
import { execa } from 'execa'
import { expect } from 'vitest'
import type { RbdSite } from './rbd-site.ts'

/** An instance of images and files that no libvirt knows, with a storage and a state folder of its own. */
export class RbdInstance {
  /** For its files; goes with the cluster. */
  readonly folder: string
  readonly storage: LocalDriver
  readonly stateDir: string
  /** What its runs told. */
  readonly events: VarveEvent[] = []
  readonly #site: RbdSite
  readonly #disks: Readonly<Record<string, string>>

  private constructor(site: RbdSite, folder: string, disks: Readonly<Record<string, string>>) {
    this.folder = folder
    this.stateDir = join(folder, 'state')
    this.storage = new LocalDriver({ path: join(folder, 'storage'), create: true })
    this.#site = site
    this.#disks = disks
  }

  /** @param disks their paths, by name; or the one of vda */
  static async of(site: RbdSite, disks: string | Readonly<Record<string, string>>): Promise<RbdInstance> {
    const folder = await mkdtemp(join(site.ceph.folder, 'instance-'))
    return new RbdInstance(site, folder, typeof disks === 'string' ? { vda: disks } : disks)
  }

  /** The same, with other disks from now on. */
  with(disks: Readonly<Record<string, string>>): RbdInstance {
    return new RbdInstance(this.#site, this.folder, disks)
  }

  host(connector: RbdConnector = this.#site.rbd): Host {
    return new ImageHost({ instance: 'web-1', disks: this.#disks, rbd: connector })
  }

  /** What a pipeline works with. */
  parts(connector?: RbdConnector) {
    return { host: this.host(connector), storage: this.storage, stateDir: this.stateDir }
  }

  get run(): RunOptions {
    return { onEvent: event => void this.events.push(event) }
  }

  warnings(): string[] {
    return this.events.flatMap(event => (event.type === 'warning' ? [event.message] : []))
  }

  get chains(): ChainManager {
    return new ChainManager(this.parts())
  }

  backup(request: Partial<BackupRequest> = {}, connector?: RbdConnector): Promise<BackupManifest> {
    return new BackupPipeline(this.parts(connector)).run({ instance: 'web-1', ...request }, this.run)
  }

  restore(request: RestoreRequest): Promise<RestoreResult> {
    return new RestorePipeline(this.parts()).run(request, this.run)
  }

  /** Restores over its disks. */
  restoreInPlace({ id }: BackupManifest): Promise<RestoreResult> {
    return this.restore({ backup: id, to: { disks: this.#disks }, inPlace: true })
  }

  /** The bytes of a backup, restored to a new raw file. */
  async restored({ id }: BackupManifest, disk = 'vda'): Promise<Buffer> {
    const path = join(this.folder, `restored-${id}-${disk}`)
    await this.restore({ backup: id, to: { disks: { [disk]: path }, format: 'raw' } })
    return readFile(path)
  }

  /** The bytes of a backup, restored to a new qcow2 file. */
  async restoredToQcow2({ id }: BackupManifest): Promise<Buffer> {
    const path = join(this.folder, `restored-${id}.qcow2`)
    await this.restore({ backup: id, to: { disks: { vda: path } } })
    await checkQcow2(path)
    return this.rawOf(path)
  }

  /** What a qcow2 file holds. */
  async rawOf(path: string): Promise<Buffer> {
    const raw = join(this.folder, 'converted.raw')
    await execa('qemu-img', ['convert', '-f', 'qcow2', '-O', 'raw', path, raw])
    return readFile(raw)
  }
}

export function expectSame(found: Buffer, expected: Buffer): void {
  expect(found.length).toBe(expected.length)
  expect(Buffer.compare(found, expected)).toBe(0)
}

/** A cluster with something that happens around its calls. */
export function clusterWith(
  rbd: RbdConnector,
  change: (cluster: RbdCluster) => Partial<RbdCluster>,
): RbdConnector {
  return {
    cluster(connection) {
      const cluster = rbd.cluster(connection)
      return Object.assign(cluster, change(rbd.cluster(connection)))
    },
  }
}
