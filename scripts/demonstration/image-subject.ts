import { randomBytes } from 'node:crypto'
import { writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { type Host, ImageHost } from '@varve/core'
import { compareImages, type DiskImage, qemuIo, sha256Content } from '@varve/testkit/lab'
import { execa } from 'execa'
import type { Screen } from './screen.ts'
import type { Source } from './source.ts'
import { assert } from './story.ts'
import type { Subject } from './subject.ts'

const MEBIBYTE = 1024 * 1024
const DISKS = ['vda', 'vdb']

/** Two disk images, with qemu-io as the writer: for machines on which libvirt cannot run. */
export class ImageSubject implements Subject {
  readonly instance = 'web-1'
  readonly host: Host
  readonly source: Source
  readonly titles = {
    prepare: 'Make two disk images',
    full: 'Full backup',
    change: 'Change, zero and trim with qemu-io',
    ruin: 'Disaster: the images are overwritten',
    restore: 'Restore over the images',
  }
  readonly #folder: string
  readonly #screen: Screen

  constructor(folder: string, source: Source, screen: Screen) {
    this.#folder = folder
    this.#screen = screen
    this.source = source
    const disks = Object.fromEntries(DISKS.map(disk => [disk, source.path(disk)]))
    this.host = new ImageHost({ instance: this.instance, disks, ...source.connector })
  }

  async prepare(): Promise<void> {
    const random = join(this.#folder, 'random')
    await this.#screen.step('vda 256 MiB with 64 MiB of random data, vdb 64 MiB with a pattern', async () => {
      await this.source.create('vda', 256 * MEBIBYTE)
      await this.source.create('vdb', 64 * MEBIBYTE)
      for (let at = 0; at < 64; at += 16) {
        await writeFile(random, randomBytes(16 * MEBIBYTE))
        await this.#io('vda', `write -s ${random} ${at * 4}M 16M`)
      }
      await this.#io('vdb', 'write -P 0x11 1M 48M')
    })
  }

  during<T>(backup: () => Promise<T>): Promise<T> {
    return backup()
  }

  async change(round: number): Promise<void> {
    const at = round * 10
    await this.#screen.step('Changes 2 MiB of vda and 64 KiB of vdb', async () => {
      await this.#io('vda', `write -P 0x${round}a ${at}M 2M`)
      await this.#io('vdb', `write -P 0x${round}b ${at}M 64k`)
    })
    await this.#screen.step('Zeroes 4 MiB of vda and trims 8 MiB', async () => {
      await this.#io('vda', `write -z ${192 + round}M 4M`, `discard ${198 + round}M 8M`)
    })
  }

  sum(): Promise<string> {
    const { path, format } = this.source.open('vda')
    return sha256Content(path, format)
  }

  async proveOthers(): Promise<string[]> {
    for (const name of DISKS) {
      const disk = this.source.open(name)
      await this.#screen.step(`qemu-img compare of ${name} and what was restored`, () =>
        this.#assertSame(disk, this.source.open(`new-${name}`)),
      )
      const copy = this.#copy(name)
      await execa('qemu-img', ['convert', '-f', disk.format, '-O', copy.format, disk.path, copy.path])
    }
    return ['both restored images are what the disks hold: qemu-img compare']
  }

  async ruin(): Promise<void> {
    await this.#screen.step('qemu-io writes over both', async () => {
      await this.#io('vda', 'write -P 0xff 0 128M')
      await this.#io('vdb', 'discard 0 64M')
    })
  }

  async proveRestored(sum: string): Promise<string[]> {
    const found = await this.#screen.step('SHA-256 of vda', () => this.sum())
    assert(found === sum, `vda has the SHA-256 ${found}, not ${sum}.`)
    for (const name of DISKS) {
      await this.#screen.step(`qemu-img compare of ${name} with a copy from before the disaster`, () =>
        this.#assertSame(this.source.open(name), this.#copy(name)),
      )
    }
    return ['the images are what they were before they were overwritten: qemu-img compare, and SHA-256']
  }

  async #assertSame(image: DiskImage, other: DiskImage): Promise<void> {
    const { identical, message } = await compareImages(image, other)
    assert(identical, `${image.path} and ${other.path} differ: ${message}`)
  }

  #io(disk: string, ...commands: string[]): Promise<string> {
    const { path, format } = this.source.open(disk)
    return qemuIo(path, format, commands)
  }

  #copy(disk: string): DiskImage {
    return { path: join(this.#folder, `before-${disk}.qcow2`), format: 'qcow2' }
  }
}
