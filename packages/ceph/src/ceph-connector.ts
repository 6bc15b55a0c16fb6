import type { RbdCluster, RbdConnection, RbdConnector } from '@varve/core'
import { CephCluster } from './ceph-cluster.ts'
import { type CephOptions, toConnection } from './connection.ts'

/**
 * Reaches Ceph clusters by the `rbd` program of Ceph 14 or newer, Debian package ceph-common. To be given to a host:
 *
 * ```ts
 * const host = new LibvirtHost({ rbd: new CephConnector() })
 * ```
 *
 * A disk of libvirt's names its cluster, its user and its key itself. What it does not name, and what an image is that
 * is given by its name alone, comes from the options.
 */
export class CephConnector implements RbdConnector {
  readonly #options: CephOptions

  /** @throws INVALID_CONFIG */
  constructor(options: CephOptions = {}) {
    toConnection(options)
    this.#options = { ...options }
  }

  /** The cluster at the end of a connection; without one, that of the options. @throws INVALID_CONFIG */
  cluster(connection: RbdConnection = {}): RbdCluster {
    return new CephCluster(toConnection(this.#options, connection))
  }
}
