import { resolve } from 'node:path'
import { changeEach } from './change-each.ts'
import { VarveError } from './errors.ts'
import type {
  DiskBitmapChange,
  FileDisk,
  Host,
  HostDisk,
  HostReference,
  Instance,
  InstanceDisks,
} from './host.ts'
import {
  addImageBitmap,
  changeImageBitmaps,
  offlineDisk,
  readImageInfo,
  readOfflineDisk,
  resolveDisk,
} from './qemu-img.ts'
import { type RbdCluster, type RbdConnector, rbdImageOf } from './rbd.ts'
import { noConnector, readRbdDisk } from './rbd-disk.ts'
import type { RunOptions } from './run-options.ts'

/** Disk names are parts of file names on a storage. */
const DISK_NAME = /^[A-Za-z0-9_][A-Za-z0-9_-]{0,63}$/

/** Options of {@link ImageHost}. */
export interface ImageHostOptions {
  /** The name under which the backups are kept. */
  instance: string
  /**
   * Each disk's image by disk name, such as `{ vda: '/srv/web-1.qcow2' }`. A name is up to 64 of `A-Z a-z 0-9 _ -`;
   * a relative path is taken from the current folder. Without a format it is told from
   * the content, which a guest can make look like another one: it can write a header of its choice into its raw disk. So state
   * the format of every raw disk. What looks like qcow2 needs it stated where it is a block device or names a backing or
   * data file. `rbd:<pool>/[<namespace>/]<image>` is an RBD image.
   */
  disks: Readonly<Record<string, ImageDisk>>
  /** What reaches RBD images: `new CephConnector()` of `@varve/ceph`. */
  rbd?: RbdConnector
}

/** A disk image: its path, or its path and format. */
export type ImageDisk =
  | string
  | {
      /** The file or block device, or `rbd:<pool>/[<namespace>/]<image>`. */
      readonly path: string
      /** Its format, which is looked up where it is not stated. */
      readonly format: 'qcow2' | 'raw'
    }

/** Disk images that no virtual machine uses while they are backed up or restored; libvirt is not needed. */
export class ImageHost implements Host {
  /** What makes the same host again in another process. */
  readonly reference: HostReference
  readonly #instance: string
  readonly #disks: Readonly<Record<string, ImageDisk>>
  readonly #rbd: RbdConnector | undefined

  /** @throws INVALID_ARGUMENT for a disk name that is none */
  constructor(options: ImageHostOptions) {
    const { instance } = options
    // A journal is settled by a process that may be in another folder.
    const disks = Object.fromEntries(
      Object.entries(options.disks).map(([name, disk]) => [checkedName(name), absolute(disk)]),
    )
    this.#instance = instance
    this.#disks = disks
    this.#rbd = options.rbd
    this.reference = { kind: 'image', instance, disks }
  }

  async disks(name: string): Promise<InstanceDisks> {
    this.#assertOwn(name)
    const disks: { name: string; path: string }[] = []
    for (const [name, disk] of Object.entries(this.#disks)) {
      const path = pathOf(disk)
      disks.push({ name, path: rbdImageOf(path) === undefined ? await resolveDisk(name, path) : path })
    }
    return { name, disks, primary: disks[0]?.name, unsupported: new Map() }
  }

  async instance(name: string, run: RunOptions = {}): Promise<Instance> {
    this.#assertOwn(name)
    const disks: HostDisk[] = []
    for (const [name, disk] of Object.entries(this.#disks)) {
      const image = rbdImageOf(pathOf(disk))
      if (image === undefined) disks.push(await readDisk(name, disk, run))
      else disks.push(await readRbdDisk(name, image, await this.rbd(), run))
    }
    return { name, running: false, disks, primary: disks[0]?.name, unsupported: new Map() }
  }

  async assertBacking(): Promise<void> {
    // nothing but the images says what is under them
  }

  async describe(): Promise<undefined> {
    return undefined // images have no definition
  }

  async addBitmap(
    _instance: string,
    disks: readonly FileDisk[],
    bitmap: string,
    granularity: number,
    run: RunOptions = {},
  ): Promise<void> {
    for (const disk of disks) await addImageBitmap(disk, { name: bitmap, granularity }, run)
  }

  async changeBitmaps(
    _instance: string,
    changes: readonly DiskBitmapChange[],
    run: RunOptions = {},
  ): Promise<void> {
    await changeEach(changes, async change => {
      const image = this.#disks[change.disk.name]
      if (image !== undefined) await changeImageBitmaps(pathOf(image), change, run)
    })
  }

  overlayPath(): Promise<string> {
    return Promise.reject(notRunning())
  }

  snapshot(): Promise<void> {
    return Promise.reject(notRunning())
  }

  commitOverlay(): Promise<void> {
    return Promise.reject(notRunning())
  }

  freezeFilesystems(): Promise<void> {
    return Promise.reject(notRunning())
  }

  async thawFilesystems(): Promise<void> {
    // nothing runs, so nothing is frozen
  }

  suspend(): Promise<boolean> {
    return Promise.reject(notRunning())
  }

  async isPaused(): Promise<boolean> {
    return false // nothing runs
  }

  async resume(): Promise<void> {
    // nothing runs
  }

  async rbd(): Promise<RbdCluster> {
    if (!this.#rbd) throw noConnector()
    return this.#rbd.cluster()
  }

  async powerOff(): Promise<void> {
    // nothing runs
  }

  async hasSavedMemory(): Promise<boolean> {
    return false // images have no memory
  }

  async waitUntilOff(): Promise<boolean> {
    return true // nothing runs
  }

  start(): Promise<void> {
    return Promise.reject(notRunning())
  }

  async dropBacking(): Promise<void> {
    // images have no definition
  }

  define(): Promise<void> {
    return Promise.reject(notRunning())
  }

  #assertOwn(name: string): void {
    if (name === this.#instance) return
    throw new VarveError(
      'INSTANCE_NOT_FOUND',
      `These images are the instance ${this.#instance}, not ${name}. Ask for that one, or name the images of ${name}.`,
      { context: { instance: name } },
    )
  }
}

function checkedName(name: string): string {
  if (DISK_NAME.test(name)) return name
  throw new VarveError(
    'INVALID_ARGUMENT',
    `Not a disk name: ${JSON.stringify(name)}. It needs 1 to 64 letters, digits, _ or -, such as vda.`,
    { context: { disk: name } },
  )
}

function pathOf(disk: ImageDisk): string {
  return typeof disk === 'string' ? disk : disk.path
}

function absolute(disk: ImageDisk): ImageDisk {
  if (rbdImageOf(pathOf(disk)) !== undefined) return disk
  return typeof disk === 'string' ? resolve(disk) : { ...disk, path: resolve(disk.path) }
}

async function readDisk(name: string, disk: ImageDisk, run: RunOptions): Promise<FileDisk> {
  if (typeof disk !== 'string') return readOfflineDisk(name, disk.path, disk.format, run)
  const info = await readImageInfo(disk, undefined, run)
  const context = { disk: name, path: disk, format: info.format }
  if (info.format !== 'qcow2' && info.format !== 'raw') {
    throw new VarveError(
      'DISK_UNSUPPORTED',
      `The disk ${name} (${disk}) looks like an image of the format ${info.format}. Varve backs up qcow2 and raw: convert it (qemu-img convert -O qcow2), or state that it is a raw disk (format, --disk ${name}=${disk},format=raw).`,
      { context },
    )
  }
  const found = await offlineDisk(name, disk, info.format, info)
  if (
    info.format === 'qcow2' &&
    (found.blockDevice || info.backing !== undefined || info.dataFile !== undefined)
  ) {
    const what = found.blockDevice ? 'and is a block device' : 'with a backing or data file'
    throw new VarveError(
      'DISK_UNSUPPORTED',
      `The disk ${name} (${disk}) looks like a qcow2 image ${what}. State its format (format, --disk ${name}=${disk},format=...), so that no raw disk can pass for one.`,
      { context },
    )
  }
  return found
}

function notRunning(): VarveError {
  return new VarveError(
    'INVALID_ARGUMENT',
    'Plain disk images do not run. Use LibvirtHost for a virtual machine.',
  )
}
