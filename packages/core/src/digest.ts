import { Blake3Hasher, blake3 } from '@napi-rs/blake-hash'
import { VarveError } from './errors.ts'
import type { ObjectDigest } from './manifest.ts'

/** Bytes in each block that has a digest of its own. */
export const DIGEST_BLOCK_SIZE: number = 4 * 1024 * 1024

/** Bytes of one BLAKE3 digest. */
export const DIGEST_LENGTH = 32

/** What {@link BlockDigester.finish} tells of an object. */
export interface DigestedObject {
  /** Size of the object in bytes. */
  readonly size: number
  /** What the manifest records. */
  readonly digest: ObjectDigest
  /** The digests of the blocks, {@link DIGEST_LENGTH} bytes each, in their order. */
  readonly blocks: Uint8Array
}

/**
 * Digests an object block by block while its bytes pass by in order, in chunks of any size. No byte is
 * copied; what it holds is 32 bytes for each block.
 */
export class BlockDigester {
  readonly #blockSize: number
  readonly #hasher = new Blake3Hasher()
  #blocks = new Uint8Array(64 * DIGEST_LENGTH)
  #blocksLength = 0
  #filled = 0
  #size = 0
  #finished = false

  /**
   * @param blockSize bytes in each block but the last; default {@link DIGEST_BLOCK_SIZE}
   * @throws INVALID_ARGUMENT for a block size that is no positive integer
   */
  constructor(blockSize: number = DIGEST_BLOCK_SIZE) {
    if (!Number.isSafeInteger(blockSize) || blockSize < 1) {
      throw new VarveError('INVALID_ARGUMENT', `Not a block size: ${blockSize}. It is a positive integer.`)
    }
    this.#blockSize = blockSize
  }

  /** The next bytes of the object. They are not kept. */
  update(chunk: Uint8Array): void {
    if (this.#finished) throw new VarveError('INVALID_ARGUMENT', 'The object was already finished.')
    for (let offset = 0; offset < chunk.byteLength; ) {
      const length = Math.min(chunk.byteLength - offset, this.#blockSize - this.#filled)
      this.#hasher.update(length === chunk.byteLength ? chunk : chunk.subarray(offset, offset + length))
      this.#filled += length
      offset += length
      if (this.#filled === this.#blockSize) this.#endBlock()
    }
    this.#size += chunk.byteLength
  }

  /** Ends the object. Nothing can be added to it any more. */
  finish(): DigestedObject {
    if (this.#filled > 0) this.#endBlock()
    this.#finished = true
    const blocks = this.#blocks.slice(0, this.#blocksLength)
    return { size: this.#size, digest: { root: rootDigest(blocks), blockSize: this.#blockSize }, blocks }
  }

  #endBlock(): void {
    if (this.#blocksLength === this.#blocks.byteLength) {
      const grown = new Uint8Array(this.#blocks.byteLength * 2)
      grown.set(this.#blocks)
      this.#blocks = grown
    }
    this.#blocks.set(this.#hasher.digestBuffer(), this.#blocksLength)
    this.#blocksLength += DIGEST_LENGTH
    this.#hasher.reset()
    this.#filled = 0
  }
}

/** The digest of one block: its BLAKE3, {@link DIGEST_LENGTH} bytes. */
export function blockDigest(block: Uint8Array): Uint8Array {
  return blake3(block)
}

/** The digest of an object: the BLAKE3 of the list of its blocks' digests, as 64 lower-case hex digits. */
export function rootDigest(blocks: Uint8Array): string {
  return blake3Hex(blocks)
}

/** The BLAKE3 of bytes, as 64 lower-case hex digits. */
export function blake3Hex(bytes: Uint8Array): string {
  return blake3(bytes).toString('hex')
}
