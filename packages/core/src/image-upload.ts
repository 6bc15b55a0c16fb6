import { Readable } from 'node:stream'
import { Blake3Hasher } from '@napi-rs/blake-hash'
import type { ComposedImage } from '@varve/qcow2'
import { BLOCK_LIST_MAX_BYTES, blockListBytes } from './block-list.ts'
import { blockDigest, DIGEST_BLOCK_SIZE, DIGEST_LENGTH, rootDigest } from './digest.ts'
import { diskError } from './disk-error.ts'
import { VarveError } from './errors.ts'
import type { ObjectDigest } from './manifest.ts'
import type { RateLimit } from './rate-limit.ts'
import type { ByteRange, UploadBody } from './storage.ts'

/**
 * A composed image as the body of an upload. Every block that passes is digested; one that passes again, on
 * a retry, must be the same.
 */
export class ImageUpload implements UploadBody {
  readonly size: number
  readonly replayable = true
  readonly #image: ComposedImage
  readonly #disk: string
  readonly #limit: RateLimit | undefined
  readonly #signal: AbortSignal | undefined
  readonly #blocks: Uint8Array
  readonly #digested: Uint8Array

  /** `disk` is the name of the image's disk, for errors. */
  constructor(image: ComposedImage, options: { disk: string; limit?: RateLimit; signal?: AbortSignal }) {
    this.#image = image
    this.#disk = options.disk
    this.#limit = options.limit
    this.#signal = options.signal
    this.size = image.size
    const bytes = blockListBytes(image.size, { blockSize: DIGEST_BLOCK_SIZE })
    if (bytes > BLOCK_LIST_MAX_BYTES) throw tooLarge(this.#disk, image.size)
    const count = bytes / DIGEST_LENGTH
    this.#blocks = new Uint8Array(count * DIGEST_LENGTH)
    this.#digested = new Uint8Array(count)
  }

  open(range: ByteRange = { start: 0, end: this.size }): Readable {
    return Readable.from(this.#guarded(range), { objectMode: false, highWaterMark: 1 })
  }

  recycle(chunk: Uint8Array): void {
    this.#image.recycle(chunk)
  }

  /** The digests of the whole image; blocks that no reader took as a whole are read for it. */
  async digest(): Promise<{ digest: ObjectDigest; blocks: Uint8Array }> {
    for (let block = 0; block < this.#digested.length; block++) {
      if (this.#digested[block]) continue
      const start = block * DIGEST_BLOCK_SIZE
      const bytes = new Uint8Array(Math.min(DIGEST_BLOCK_SIZE, this.size - start))
      await this.#image.read(start, bytes, this.#signal && { signal: this.#signal })
      this.#set(block, blockDigest(bytes))
    }
    return { digest: { root: rootDigest(this.#blocks), blockSize: DIGEST_BLOCK_SIZE }, blocks: this.#blocks }
  }

  /** A driver that reads this sees errors of the disk as such, and not as a failed upload. */
  async *#guarded(range: ByteRange): AsyncGenerator<Uint8Array> {
    try {
      yield* this.#chunks(range)
    } catch (error) {
      throw diskError(this.#disk, error)
    }
  }

  async *#chunks(range: ByteRange): AsyncGenerator<Uint8Array> {
    const stream = this.#image.stream({
      start: range.start,
      end: range.end,
      ...(this.#limit && { chunkSize: this.#limit.piece }),
      ...(this.#signal && { signal: this.#signal }),
    })
    // A block that the range enters in its middle is left to a later pass.
    let hasher = range.start % DIGEST_BLOCK_SIZE === 0 ? new Blake3Hasher() : undefined
    let position = range.start
    for await (const chunk of stream as AsyncIterable<Buffer>) {
      await this.#limit?.take(chunk.length, this.#signal)
      for (let at = 0; at < chunk.length; ) {
        const block = Math.floor(position / DIGEST_BLOCK_SIZE)
        const blockEnd = Math.min((block + 1) * DIGEST_BLOCK_SIZE, this.size)
        const take = Math.min(chunk.length - at, blockEnd - position)
        hasher?.update(chunk.subarray(at, at + take))
        at += take
        position += take
        if (position === blockEnd) {
          if (hasher) this.#set(block, hasher.digestBuffer())
          hasher = new Blake3Hasher()
        }
      }
      yield chunk
    }
  }

  #set(block: number, digest: Uint8Array): void {
    const at = block * DIGEST_LENGTH
    if (
      this.#digested[block] &&
      Buffer.compare(this.#blocks.subarray(at, at + DIGEST_LENGTH), digest) !== 0
    ) {
      throw new VarveError(
        'DIGEST_MISMATCH',
        `Block ${block} of the image changed between two reads of the frozen disk. Another process writes to the disk: find it before the next backup.`,
        {
          context: { block, offset: block * DIGEST_BLOCK_SIZE },
        },
      )
    }
    this.#blocks.set(digest, at)
    this.#digested[block] = 1
  }
}

function tooLarge(disk: string, size: number): VarveError {
  const message = `The image of ${disk} has ${size} bytes; a backup's images have at most 128 TiB. Leave the disk out and back it up by other means.`
  return new VarveError('DISK_UNSUPPORTED', message, { context: { disk, size } })
}
