import { abortError } from './errors.ts'

/** The memory of one block. It belongs to whoever got it from a {@link BlockPool}, until it is given back. */
export class BlockSlot {
  /** The bytes that it holds. */
  bytes: Uint8Array = new Uint8Array(0)
  #own: Uint8Array | undefined

  /** Makes {@link BlockSlot.bytes} `length` bytes of memory that is kept for the next block. */
  allocate(length: number, blockSize: number): Uint8Array {
    this.#own ??= new Uint8Array(new ArrayBuffer(blockSize))
    this.bytes = this.#own.subarray(0, length)
    return this.bytes
  }

  /** Leaves the memory to whoever may still write to it, and takes other of the same length. */
  renew(): void {
    const { length } = this.bytes
    const blockSize = this.#own?.length ?? length
    this.#own = undefined
    this.allocate(length, blockSize)
  }
}

interface Waiting {
  readonly give: (slot: BlockSlot) => void
}

/**
 * A fixed number of blocks in memory, whatever the size of what flows through them. A slot is in use by
 * someone, or kept as a cached block that may be evicted, or free.
 */
export class BlockPool {
  /** Bytes of a slot. */
  readonly blockSize: number
  /** The number of slots. */
  readonly capacity: number
  #made = 0
  readonly #free: BlockSlot[] = []
  readonly #waiting = new Set<Waiting>()
  /** Cached slots, the one longest unused first, with what to do when one is evicted. */
  readonly #kept = new Map<BlockSlot, () => void>()
  readonly #idle: (() => void)[] = []

  /** `memory` is in bytes; the pool has at least {@link BlockPool.leastBlocks} slots. */
  constructor(memory: number, blockSize: number) {
    this.blockSize = blockSize
    this.capacity = Math.max(BlockPool.leastBlocks, Math.floor(memory / blockSize))
  }

  /** Fewer slots than this would make the readers of several images evict each other's blocks. */
  static readonly leastBlocks: number = 8

  /** Slots that stay free of cached blocks, for those that are being filled and written. */
  static readonly #working = 4

  /** Slots in use, neither free nor kept. */
  get inUse(): number {
    return this.#made - this.#free.length - this.#kept.size
  }

  /** A slot; waits until there is one. */
  acquire(signal: AbortSignal): Promise<BlockSlot> {
    if (signal.aborted) return Promise.reject(abortError(signal))
    const free = this.#free.pop()
    if (free) return Promise.resolve(free)
    if (this.#made < this.capacity) {
      this.#made++
      return Promise.resolve(new BlockSlot())
    }
    return new Promise((resolve, reject) => {
      const onAbort = (): void => {
        this.#waiting.delete(waiting)
        reject(abortError(signal))
      }
      const waiting: Waiting = {
        give(slot) {
          signal.removeEventListener('abort', onAbort)
          resolve(slot)
        },
      }
      this.#waiting.add(waiting)
      signal.addEventListener('abort', onAbort, { once: true })
    })
  }

  /** Takes a slot back. */
  release(slot: BlockSlot): void {
    const [next] = this.#waiting
    if (next) {
      this.#waiting.delete(next)
      next.give(slot)
      return
    }
    this.#free.push(slot)
    this.#whenIdle()
  }

  /** Keeps a slot and what is in it until {@link BlockPool.take}, or until its memory is needed: then `evicted` is called. */
  keep(slot: BlockSlot, evicted: () => void): void {
    this.#kept.set(slot, evicted)
    const [oldest] = this.#kept
    if (oldest && this.#kept.size > this.capacity - BlockPool.#working) {
      this.#kept.delete(oldest[0])
      oldest[1]()
      this.release(oldest[0])
    }
    this.#whenIdle()
  }

  /** Makes a kept slot one that is in use. */
  take(slot: BlockSlot): BlockSlot {
    this.#kept.delete(slot)
    return slot
  }

  /** Resolves when no slot is in use. */
  idle(): Promise<void> {
    if (this.inUse === 0) return Promise.resolve()
    return new Promise(resolve => this.#idle.push(resolve))
  }

  #whenIdle(): void {
    if (this.inUse > 0) return
    for (const resolve of this.#idle.splice(0)) resolve()
  }
}
