import { randomBytes } from 'node:crypto'
import { copyFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { type Host, ImageHost } from '@varve/core'
import { compareImages, createQcow2, qemuIo, sha256Content } from '@varve/testkit/lab'
import type { Screen } from './screen.ts'
import { assert } from './story.ts'
import type { Subject } from './subject.ts'

const MEBIBYTE = 1024 * 1024

/** Two disk images, with qemu-io as the writer: for machines on which libvirt cannot run. */
export class ImageSubject implements Subject {
  readonly instance = 'web-1'
  readonly host: Host
  readonly disks: Readonly<Record<string, string>>
  readonly titles = {
    prepare: 'Make two disk images',
    full: 'Full backup',
    change: 'Change, zero and trim with qemu-io',
    ruin: 'Disaster: the images are overwritten',
    restore: 'Restore over the images',
  }
  readonly #folder: string
  readonly #screen: Screen

  constructor(folder: string, screen: Screen) {
    this.#folder = folder
    this.#screen = screen
    this.disks = { vda: join(folder, 'vda.qcow2'), vdb: join(folder, 'vdb.qcow2') }
    this.host = new ImageHost({ instance: this.instance, disks: this.disks })
  }

  async prepare(): Promise<void> {
    const random = join(this.#folder, 'random')
    await this.#screen.step('vda 1 GiB with 256 MiB of random data, vdb 64 MiB with a pattern', async () => {
      await createQcow2(this.#path('vda'), 1024 * MEBIBYTE)
      await createQcow2(this.#path('vdb'), 64 * MEBIBYTE)
      for (let at = 0; at < 256; at += 64) {
        await writeFile(random, randomBytes(64 * MEBIBYTE))
        await this.#io('vda', `write -s ${random} ${at * 3}M 64M`)
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
      await this.#io('vda', `write -z ${192 + at}M 4M`, `discard ${200 + at}M 8M`)
    })
  }

  sum(): Promise<string> {
    return sha256Content(this.#path('vda'), 'qcow2')
  }

  async proveOthers(restored: Readonly<Record<string, string>>): Promise<string[]> {
    for (const name of Object.keys(this.disks)) {
      await this.#screen.step(`qemu-img compare of ${name} and what was restored`, () =>
        this.#assertSame(this.#path(name), restored[name] ?? ''),
      )
      await copyFile(this.#path(name), this.#copy(name))
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
    for (const name of Object.keys(this.disks)) {
      await this.#screen.step(`qemu-img compare of ${name} with a copy from before the disaster`, () =>
        this.#assertSame(this.#path(name), this.#copy(name)),
      )
    }
    return ['the images are what they were before they were overwritten: qemu-img compare, and SHA-256']
  }

  async #assertSame(path: string, other: string): Promise<void> {
    const { identical, message } = await compareImages(
      { path, format: 'qcow2' },
      { path: other, format: 'qcow2' },
    )
    assert(identical, `${path} and ${other} differ: ${message}`)
  }

  #io(disk: string, ...commands: string[]): Promise<string> {
    return qemuIo(this.#path(disk), 'qcow2', commands)
  }

  #path(disk: string): string {
    return this.disks[disk] ?? ''
  }

  #copy(disk: string): string {
    return join(this.#folder, `before-${disk}.qcow2`)
  }
}
