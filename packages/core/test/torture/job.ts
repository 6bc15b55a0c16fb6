import { writeFileSync } from 'node:fs'
import { CephConnector, type CephOptions } from '@varve/ceph'
import type { S3DriverOptions } from '@varve/driver-s3'
import type { BackupRequest } from '../../src/backup-pipeline.ts'
import type { Host, HostReference } from '../../src/host.ts'
import { ImageHost } from '../../src/image-host.ts'
import { LibvirtHost } from '../../src/libvirt-host.ts'
import type { PrunePolicy } from '../../src/prune.ts'
import type { RestoreRequest } from '../../src/restore-pipeline.ts'
import type { Kill } from './kill-points.ts'

/** What a victim is to do. */
export type Task =
  | { readonly kind: 'backup'; readonly request: BackupRequest }
  | { readonly kind: 'restore'; readonly request: RestoreRequest }
  | { readonly kind: 'delete'; readonly backup: string }
  | { readonly kind: 'prune'; readonly policy: PrunePolicy }
  | { readonly kind: 'recover' }

/** Where and when. */
export interface Job {
  readonly task: Task
  readonly host: HostReference
  /** Where the backups are: a folder, or a bucket. */
  readonly storage: StoragePlace
  readonly stateDir: string
  /** Where the stand-in for the guest agent keeps whether the guest is frozen. */
  readonly frozenFlag: string
  /** How the Ceph cluster of RBD disks is reached. */
  readonly ceph?: CephOptions
  readonly kill?: Kill
}

/** The path of a folder, or what an S3 driver is made with. */
export type StoragePlace = string | S3DriverOptions

/** What came of a task. */
export interface Result {
  /** The backup that it took. */
  readonly backup?: string
  /** The backups that it removed. */
  readonly removed?: readonly string[]
}

/** What a victim says: that it waits for the guest's writes, and how it ended where it was not killed. */
export type Message =
  | { readonly say: 'streaming' }
  | ({ readonly say: 'done'; readonly points: readonly string[] } & Result)
  | {
      readonly say: 'failed'
      readonly code: string
      readonly message: string
      readonly points: readonly string[]
    }

/** A libvirt host whose guests have an agent: a file, as a real one needs a booted guest. */
export class AgentHost extends LibvirtHost {
  readonly #flag: string

  constructor(uri: string, flag: string, ceph?: CephOptions) {
    super({ uri, ...(ceph && { rbd: new CephConnector(ceph) }) })
    this.#flag = flag
  }

  override async freezeFilesystems(): Promise<void> {
    writeFileSync(this.#flag, 'frozen')
  }

  override async thawFilesystems(instance: string): Promise<void> {
    if (await this.isPaused(instance))
      throw new Error('The agent of a guest that stands still does not answer.')
    writeFileSync(this.#flag, 'thawed')
  }
}

/** The host that a job means. */
export function hostOf({ host, frozenFlag, ceph }: Job): Host {
  if (host.kind === 'libvirt') return new AgentHost(host.uri, frozenFlag, ceph)
  return new ImageHost({ ...host, ...(ceph && { rbd: new CephConnector(ceph) }) })
}
