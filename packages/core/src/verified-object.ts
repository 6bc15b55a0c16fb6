import type { ImageFile } from '@varve/qcow2'
import { BlockAssembler, type BlockReceiver } from './block-assembler.ts'
import { loadBlockList } from './block-list.ts'
import type { BlockPool, BlockSlot } from './block-pool.ts'
import { blockDigest, DIGEST_LENGTH } from './digest.ts'
import { type DownloadRetry, download } from './download.ts'
import { VarveError } from './errors.ts'
import type { ObjectDigest } from './manifest.ts'
import type { StorageDriver } from './storage.ts'
import { assertStoredSize } from './stored-size.ts'

/** What a {@link VerifiedObject} is. */
export interface VerifiedObjectOptions {
  readonly storage: StorageDriver
  /** Key of the object. */
  readonly key: string
  /** Its recorded size in bytes. */
  readonly size: number
  /** Its recorded digest. */
  readonly digest: ObjectDigest
  /** Key of the list of its blocks' digests. */
  readonly blocksKey: string
  /** The memory for its blocks, which several objects share. */
  readonly pool: BlockPool
  readonly retry?: DownloadRetry | undefined
}

const never: AbortSignal = new AbortController().signal

/**
 * A stored object whose every byte is checked against its block's digest before anyone sees it. It is read
 * in whole blocks; the last one that {@link VerifiedObject.read} used stays in memory while the pool has room.
 */
export class VerifiedObject implements ImageFile {
  /** In bytes. */
  readonly size: number
  /** Bytes in each block but the last. */
  readonly blockSize: number
  /** The key of the object. */
  readonly key: string
  readonly #options: VerifiedObjectOptions
  readonly #list: Uint8Array
  /** The block that the last read ended in: the next one often begins there. */
  #cached: { readonly block: number; readonly slot: BlockSlot } | undefined
  #lastRead: Promise<void> = Promise.resolve()

  private constructor(options: VerifiedObjectOptions, list: Uint8Array) {
    this.#options = options
    this.#list = list
    this.size = options.size
    this.key = options.key
    this.blockSize = options.digest.blockSize
  }

  /**
   * Checks that the object is there with its recorded size and that its list of digests is the recorded one.
   * Fails with `OBJECT_NOT_FOUND`, `SIZE_MISMATCH` or `DIGEST_MISMATCH`.
   */
  static async open(
    options: VerifiedObjectOptions,
    { signal = never }: { signal?: AbortSignal } = {},
  ): Promise<VerifiedObject> {
    const { storage, key, size, digest, blocksKey, retry } = options
    await assertStoredSize(storage, key, size, signal)
    return new VerifiedObject(
      options,
      await loadBlockList({ storage, key: blocksKey, size, digest, signal, retry }),
    )
  }

  /** Fills `into` with the bytes from `offset` on. One call after the other, so that no block is fetched twice. */
  read(offset: number, into: Uint8Array, { signal = never }: { signal?: AbortSignal } = {}): Promise<void> {
    const read = this.#lastRead.then(() => this.#read(offset, into, signal))
    this.#lastRead = read.catch(() => undefined) // its caller is told; the next read goes on
    return read
  }

  /**
   * Hands over the blocks from `first` up to `end`, in order, each verified. One that is cached leaves the
   * cache; each run of the others is one download, which waits while the pool is empty. `DIGEST_MISMATCH`
   * names the first block that is not what was stored.
   */
  async fetch(first: number, end: number, receive: BlockReceiver, signal: AbortSignal): Promise<void> {
    for (let block = first; block < end; ) {
      const slot = this.#takeCached(block)
      if (slot) {
        receive(block++, slot)
        continue
      }
      let stop = block + 1
      while (stop < end && stop !== this.#cached?.block) stop++
      await this.#download(block, stop, receive, signal)
      block = stop
    }
  }

  async #read(offset: number, into: Uint8Array, signal: AbortSignal): Promise<void> {
    const end = offset + into.length
    if (!Number.isSafeInteger(offset) || offset < 0 || end > this.size) {
      throw new VarveError('INVALID_ARGUMENT', `Bytes ${offset} to ${end} are not within ${this.key}.`, {
        context: { key: this.key, offset, end, size: this.size },
      })
    }
    const { blockSize } = this
    await this.fetch(
      Math.floor(offset / blockSize),
      Math.ceil(end / blockSize),
      (block, slot) => {
        const start = block * blockSize
        const bytes = slot.bytes.subarray(Math.max(0, offset - start), end - start)
        into.set(bytes, Math.max(0, start - offset))
        this.#keep(block, slot)
      },
      signal,
    )
  }

  #keep(block: number, slot: BlockSlot): void {
    const { pool } = this.#options
    if (this.#cached) pool.release(pool.take(this.#cached.slot))
    this.#cached = { block, slot }
    pool.keep(slot, () => {
      this.#cached = undefined
    })
  }

  #takeCached(block: number): BlockSlot | undefined {
    if (this.#cached?.block !== block) return undefined
    const { slot } = this.#cached
    this.#cached = undefined
    return this.#options.pool.take(slot)
  }

  async #download(first: number, end: number, receive: BlockReceiver, signal: AbortSignal): Promise<void> {
    const { storage, key, pool, retry } = this.#options
    const { size, blockSize } = this
    const blocks = new BlockAssembler({ pool, blockSize, size, first, signal }, (block, slot) => {
      this.#verify(block, slot)
      receive(block, slot)
    })
    try {
      const range = { start: first * blockSize, end: Math.min(end * blockSize, size) }
      await download({ storage, key, range, signal, retry }, blocks)
    } finally {
      blocks.close()
    }
  }

  #verify(block: number, slot: BlockSlot): void {
    const at = block * DIGEST_LENGTH
    if (Buffer.compare(blockDigest(slot.bytes), this.#list.subarray(at, at + DIGEST_LENGTH)) === 0) return
    this.#options.pool.release(slot)
    const offset = block * this.blockSize
    throw new VarveError(
      'DIGEST_MISMATCH',
      `${this.key} is not what was stored: block ${block}, ${slot.bytes.length} bytes at offset ${offset}, has another digest. Restore another backup.`,
      { context: { key: this.key, block, offset } },
    )
  }
}
