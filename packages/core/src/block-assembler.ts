import type { BlockPool, BlockSlot } from './block-pool.ts'
import type { DownloadSink } from './download.ts'

/** Takes a whole block. From then on the slot is the receiver's, who gives it back to the pool. */
export type BlockReceiver = (block: number, slot: BlockSlot) => void

/** What a {@link BlockAssembler} assembles. */
export interface BlockRun {
  readonly pool: BlockPool
  /** Bytes in each block but the object's last. */
  readonly blockSize: number
  /** Size of the object in bytes. */
  readonly size: number
  /** The first block of the download. */
  readonly first: number
  readonly signal: AbortSignal
}

/**
 * Cuts a download into blocks, in slots of a pool: it waits while the pool is empty.
 */
export class BlockAssembler implements DownloadSink {
  readonly #run: BlockRun
  readonly #receive: BlockReceiver
  #block: number
  #slot: BlockSlot | undefined
  #filled = 0

  constructor(run: BlockRun, receive: BlockReceiver) {
    this.#run = run
    this.#receive = receive
    this.#block = run.first
  }

  async write(chunk: Uint8Array): Promise<void> {
    for (let rest = chunk; rest.length > 0; ) {
      this.#slot ??= await this.#run.pool.acquire(this.#run.signal)
      rest = this.#fill(this.#slot, rest)
    }
  }

  restart(): number {
    this.#filled = 0
    return this.#block * this.#run.blockSize
  }

  /** Gives back what is not a whole block. */
  close(): void {
    if (this.#slot) this.#run.pool.release(this.#slot)
    this.#slot = undefined
  }

  /** Moves bytes of `chunk` into the current block; returns those that belong to the next ones. */
  #fill(slot: BlockSlot, chunk: Uint8Array): Uint8Array {
    const { blockSize, size, pool } = this.#run
    const length = Math.min(blockSize, size - this.#block * blockSize)
    const part = chunk.subarray(0, length - this.#filled)
    if (this.#filled === 0) slot.allocate(length, pool.blockSize)
    slot.bytes.set(part, this.#filled)
    this.#filled += part.length
    if (this.#filled === length) {
      const block = this.#block++
      this.#filled = 0
      this.#slot = undefined
      this.#receive(block, slot)
    }
    return chunk.subarray(part.length)
  }
}
