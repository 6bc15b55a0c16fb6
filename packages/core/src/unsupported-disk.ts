import { isAbsolute } from 'node:path'
import type { DomainDisk, RbdSource } from './domain-xml.ts'
import { isRbdImage, type RbdConnector } from './rbd.ts'

/** Why a disk of a domain cannot be backed up; undefined where it can. */
export function unsupportedReason(
  disk: DomainDisk,
  path: string | undefined,
  connector: RbdConnector | undefined,
): string | undefined {
  if (disk.rbd) return unsupportedRbdReason(disk, disk.rbd, connector)
  if (path === undefined || !['file', 'block', 'volume'].includes(disk.type))
    return `its type is ${disk.type}`
  if (disk.volume && !isAbsolute(path))
    return `it is a volume of the libvirt pool ${disk.volume.pool} that is no file; define one of RBD with type='network'`
  if (disk.encrypted) return 'libvirt encrypts it'
  if (disk.shareable) return 'it is shared between instances'
  if (disk.sliced) return 'it is a slice of its source'
  if (disk.format !== 'qcow2' && disk.format !== 'raw') return `its format is ${disk.format}`
  return undefined
}

function unsupportedRbdReason(
  disk: DomainDisk,
  source: RbdSource,
  connector: RbdConnector | undefined,
): string | undefined {
  if (!connector) return 'it is an RBD image, and this host was made without @varve/ceph (option rbd)'
  if (disk.encrypted) return 'libvirt encrypts it'
  if (disk.shareable) return 'it is shared between instances'
  if (disk.sliced) return 'it is a slice of its source'
  if (source.snapshot !== undefined) return `it is the snapshot ${source.snapshot} of an RBD image`
  if (disk.format !== 'raw') return `its format within the RBD image is ${disk.format}`
  return isRbdImage(source.image) ? undefined : `${source.image} is no name of an RBD image`
}
