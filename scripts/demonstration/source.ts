import { join } from 'node:path'
import type { RbdConnector } from '@varve/core'
import { checkQcow2, createQcow2, type DiskImage, type LabDisk, type LibvirtLab } from '@varve/testkit/lab'
import { execa } from 'execa'
import { RbdSource } from './rbd-source.ts'

/** Where the instance's disks are, and the images that are restored. Each image has a name such as `vda` or `new-vda`. */
export interface Source extends AsyncDisposable {
  /** What it is, for the screen. */
  readonly title: string
  /** What restores a stored chain without Varve, for the screen. */
  readonly plainTool: string
  /** What a host needs to reach the images. */
  readonly connector: { readonly rbd?: RbdConnector }
  /** Makes an empty image. */
  create(image: string, size: number): Promise<void>
  /** As Varve names an image. */
  path(image: string): string
  /** As QEMU's programs open an image. */
  open(image: string): DiskImage
  /** As a disk of a virtual machine. */
  labDisk(image: string): LabDisk
  /** Rejects where an image is damaged in itself. */
  check(image: string): Promise<void>
  /** Restores a disk to an image without Varve. `folders` are those of the chain's backups, oldest first. */
  restorePlainly(disk: string, folders: readonly string[], image: string, signal: AbortSignal): Promise<void>
  /** What should not be there after a run. */
  leftovers(): Promise<string[]>
}

/** qcow2 files in a folder. */
class FileSource implements Source {
  readonly title = 'qcow2 files'
  readonly plainTool = 'qemu-img convert'
  readonly connector = {}
  readonly #folder: string

  constructor(folder: string) {
    this.#folder = folder
  }

  create(image: string, size: number): Promise<void> {
    return createQcow2(this.path(image), size)
  }

  path(image: string): string {
    return join(this.#folder, `${image}.qcow2`)
  }

  open(image: string): DiskImage {
    return { path: this.path(image), format: 'qcow2' }
  }

  labDisk(image: string): LabDisk {
    return { target: image, ...this.open(image), discard: 'unmap' }
  }

  check(image: string): Promise<void> {
    return checkQcow2(this.path(image))
  }

  async restorePlainly(
    disk: string,
    folders: readonly string[],
    image: string,
    cancelSignal: AbortSignal,
  ): Promise<void> {
    // The newest names the one before as its backing file, and so on.
    const stored = join(folders.at(-1) ?? '', `${disk}.qcow2`)
    const args = ['convert', '-f', 'qcow2', '-O', 'qcow2', stored, this.path(image)]
    await execa('qemu-img', args, { cancelSignal })
  }

  async leftovers(): Promise<string[]> {
    return []
  }

  async [Symbol.asyncDispose](): Promise<void> {
    // the folder goes as a whole
  }
}

/** The sources that `--source` chooses from. */
export const SOURCES: ReadonlyMap<string, (folder: string, lab?: LibvirtLab) => Promise<Source>> = new Map<
  string,
  (folder: string, lab?: LibvirtLab) => Promise<Source>
>([
  ['qcow2', async folder => new FileSource(folder)],
  ['rbd', (_, lab) => RbdSource.start(lab)],
])
