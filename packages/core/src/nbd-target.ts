import type { NbdClient } from '@varve/nbd'
import type { LayeredExtents } from '@varve/qcow2'
import { VarveError } from './errors.ts'
import { type RestoreTarget, type TargetOptions, targetError } from './restore-target.ts'

/** The smallest cluster of a qcow2 image that Varve writes: every write but the last is a multiple of it. */
const LEAST_CLUSTER = 4096

/**
 * A disk that is there already, an image or a block device, overwritten in place over NBD. A target that is
 * larger than the backup reads as zeros behind it. One that was given up is neither the old disk nor the new.
 */
export class NbdTarget implements RestoreTarget {
  readonly #client: NbdClient
  readonly #path: string
  readonly #size: number
  readonly #isNew: boolean

  /**
   * Touches nothing. `client` is a writable export of the target, whoever opened it closes it; `path` is the
   * image or device behind it, for messages; `isNew` where all of it reads as zeros yet. Throws `TARGET_TOO_SMALL`, or `TARGET_FAILED` for an export that
   * cannot be written to as needed.
   */
  constructor(
    client: NbdClient,
    merged: LayeredExtents,
    { path, isNew = false }: { path: string; isNew?: boolean },
  ) {
    this.#client = client
    this.#path = path
    this.#size = merged.size
    this.#isNew = isNew
    if (client.size < merged.size) {
      throw new VarveError(
        'TARGET_TOO_SMALL',
        `${path} has ${client.size} bytes and the backup's disk ${merged.size}. Make it larger, or restore to another target.`,
        { context: { path, size: client.size, needed: merged.size } },
      )
    }
    if (client.readOnly || client.blockSize.minimum > LEAST_CLUSTER) {
      const why = client.readOnly
        ? 'it is read-only'
        : `it takes writes of ${client.blockSize.minimum} bytes and more only`
      throw new VarveError('TARGET_FAILED', `${path} cannot be restored to: ${why}. Use another target.`, {
        context: { path },
      })
    }
  }

  async write(guestOffset: number, data: Uint8Array, options?: TargetOptions): Promise<void> {
    const end = guestOffset + data.length
    const added = this.#blockEnd(end) - end
    try {
      if (added === 0) return await this.#client.write(guestOffset, data, options)
      // The disk ends inside a block of the target: what follows in the block is zeros.
      const head = data.length - Math.min(data.length, this.#client.blockSize.minimum - added)
      const last = Buffer.concat([data.subarray(head), Buffer.alloc(added)])
      await this.#client.write(guestOffset, data.subarray(0, head), options)
      await this.#client.write(guestOffset + head, last, options)
    } catch (error) {
      throw targetError(error, this.#path)
    }
  }

  async zero(guestOffset: number, length: number, options?: TargetOptions): Promise<void> {
    if (this.#isNew) return
    try {
      const end = this.#blockEnd(guestOffset + length)
      await this.#client.writeZeroes(guestOffset, end - guestOffset, options)
    } catch (error) {
      throw targetError(error, this.#path)
    }
  }

  async finish(options?: TargetOptions): Promise<void> {
    const written = this.#blockEnd(this.#size)
    try {
      if (written < this.#client.size && !this.#isNew)
        await this.#client.writeZeroes(written, this.#client.size - written, options)
      await this.#client.flush(options)
    } catch (error) {
      throw targetError(error, this.#path)
    }
  }

  /** Nothing can be taken back. */
  abort(): Promise<void> {
    return Promise.resolve()
  }

  /** The end of a write: at the disk's end that of the target's block, which a write may not cut. */
  #blockEnd(end: number): number {
    if (end !== this.#size) return end
    const { minimum } = this.#client.blockSize
    return Math.min(Math.ceil(end / minimum) * minimum, this.#client.size)
  }
}
