import type { BlockPool, BlockSlot } from './block-pool.ts'
import type { DirectSink, DownloadSink } from './download.ts'

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
export class BlockAssembler implements DownloadSink, DirectSink {
  readonly direct: DirectSink = this
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
      const room = await this.room()
      const part = rest.subarray(0, room.length)
      room.set(part)
      rest = rest.subarray(part.length)
      this.filled(part.length)
    }
  }

  /** The rest of the current block. */
  async room(): Promise<Uint8Array> {
    const { blockSize, size, pool, signal } = this.#run
    if (!this.#slot) {
      this.#slot = await pool.acquire(signal)
      this.#slot.allocate(Math.min(blockSize, size - this.#block * blockSize), pool.blockSize)
    }
    return this.#slot.bytes.subarray(this.#filled)
  }

  filled(length: number): void {
    const slot = this.#slot
    if (!slot) throw new RangeError('There is no room that could be filled.')
    this.#filled += length
    if (this.#filled < slot.bytes.length) return
    const block = this.#block++
    this.#filled = 0
    this.#slot = undefined
    this.#receive(block, slot)
  }

  restart(): number {
    this.#filled = 0
    this.#slot?.renew()
    return this.#block * this.#run.blockSize
  }

  /** Gives back what is not a whole block. */
  close(): void {
    if (this.#slot) this.#run.pool.release(this.#slot)
    this.#slot = undefined
  }
}
