import { randomChange } from '../../core/test/torture/guest.ts'
import type { Random } from '../../core/test/torture/random.ts'
import type { RbdSite } from './rbd-site.ts'

const MIB = 1024 ** 2

/** An image that is there and empty, and how often a change begins with another size of it. */
export interface ModelDiskOptions {
  readonly image: string
  readonly size: number
  readonly resizeOneIn: number
}

/** An image beside a plain buffer, to which every change goes too. */
export class ModelDisk {
  bytes: Buffer
  readonly #site: RbdSite
  readonly #options: ModelDiskOptions
  readonly #random: Random

  constructor(site: RbdSite, options: ModelDiskOptions, random: Random) {
    this.bytes = Buffer.alloc(options.size)
    this.#site = site
    this.#options = options
    this.#random = random
  }

  async change(): Promise<void> {
    const { image, resizeOneIn } = this.#options
    if (this.#random.oneIn(resizeOneIn)) await this.#resize(MIB + this.#random.below(9) * 700 * 512)
    const changes = Array.from({ length: 1 + this.#random.below(6) }, () =>
      randomChange(this.bytes, this.#random),
    )
    await this.#site.write(image, ...changes)
  }

  async #resize(size: number): Promise<void> {
    if (size === this.bytes.length) return
    await this.#site.ceph.client.resize(this.#options.image, size)
    const kept = this.bytes.subarray(0, size)
    this.bytes = Buffer.concat([kept, Buffer.alloc(size - kept.length)])
  }
}
