import { readDomainXml } from './domain-xml.ts'
import { isVarveError, VarveError } from './errors.ts'
import type { Host, RbdDisk } from './host.ts'
import type { TargetImage } from './journal.ts'
import { RBD_PREFIX, type RbdCluster, type RbdSnapshot } from './rbd.ts'
import type { RunOptions } from './run-options.ts'

/** A disk that is an RBD image, as it is now. @throws DISK_NOT_FOUND */
export async function readRbdDisk(
  name: string,
  image: string,
  cluster: RbdCluster,
  run: RunOptions,
): Promise<RbdDisk> {
  const state = await cluster.image(image, run)
  return {
    name,
    path: `${RBD_PREFIX}${image}`,
    format: 'rbd',
    image,
    virtualSize: state.size,
    state,
    cluster,
  }
}

/** A snapshot that was taken, with its number. @throws RBD_SNAPSHOT_NOT_FOUND */
export async function madeSnapshot(
  cluster: RbdCluster,
  image: string,
  snapshot: string,
  run: RunOptions,
): Promise<RbdSnapshot> {
  const made = (await cluster.snapshots(image, run)).find(({ name }) => name === snapshot)
  if (made) return made
  throw new VarveError(
    'RBD_SNAPSHOT_NOT_FOUND',
    `The snapshot ${snapshot} of ${image} was made and is not there. Does something else remove snapshots of this image?`,
    { context: { image, snapshot } },
  )
}

/** Whether an error says that an image is not there, or its pool or namespace. */
export function isImageGone(error: unknown): boolean {
  return isVarveError(error, 'DISK_NOT_FOUND') || isVarveError(error, 'CEPH_POOL_NOT_FOUND')
}

/**
 * Whether the cluster that the host takes for an image is surely its own. Where the domain is not defined for the moment whose
 * disk tells it, another cluster may be asked, and that an image is not there tells nothing.
 */
export async function isClusterTold(of: TargetImage['of'], host: Host, run: RunOptions): Promise<boolean> {
  if (of === undefined || host.reference.kind === 'image') return true
  const xml = await host.describe(of.instance, run)
  const disks = xml === undefined ? [] : readDomainXml(xml).disks
  return disks.some(({ name, rbd }) => name === of.disk && rbd !== undefined)
}

/** The error of a host that meets an RBD image and does not know how to reach its cluster. */
export function noConnector(): VarveError {
  return new VarveError(
    'INVALID_ARGUMENT',
    'RBD images need a connection to their Ceph cluster: give the host one, or recover (option rbd: new CephConnector() of @varve/ceph).',
  )
}
