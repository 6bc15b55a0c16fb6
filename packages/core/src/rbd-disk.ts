import { VarveError } from './errors.ts'
import type { RbdDisk } from './host.ts'
import { RBD_PREFIX, type RbdCluster } from './rbd.ts'
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

/** The error of a host that meets an RBD image and does not know how to reach its cluster. */
export function noConnector(): VarveError {
  return new VarveError(
    'INVALID_ARGUMENT',
    'RBD images need a connection to their Ceph cluster: give the host one (option rbd: new CephConnector() of @varve/ceph).',
  )
}
