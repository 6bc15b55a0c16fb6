import type { Readable } from 'node:stream'
import { ChunkPool } from './chunk-pool.ts'
import { ChunkStream } from './chunk-stream.ts'
import { Qcow2Error } from './errors.ts'
import type { ImageLayout } from './image-layout.ts'

/** Options of a read. */
export interface ReadOptions {
  /** Gives the read up: it rejects with the signal's reason. */
  signal?: AbortSignal
}

/** Where the data clusters come from: a frozen disk, such as an NBD export. */
export interface GuestReader {
  /**
   * Fills all of `into` with the guest's bytes from `offset` on. May be called many times at once. It settles
   * only when nothing writes to `into` any more.
   */
  read(offset: number, into: Uint8Array, options?: ReadOptions): Promise<void>
}

/** Options of {@link ComposedImage.stream}. */
export interface StreamOptions {
  /** File offset of the first byte. Default: 0. */
  start?: number
  /** File offset of the first byte after the last. Default: the end of the file. */
  end?: number
  /** Ends the stream with the signal's reason. */
  signal?: AbortSignal
  /** Bytes in each chunk but the last. Default: 1 MiB. */
  chunkSize?: number
  /** Chunks that are being read or wait to be taken, at most. Default: 16. */
  readAhead?: number
}

/** A qcow2 file that exists nowhere: any byte of it is computed from its layout or read from the guest. */
export class ComposedImage {
  /** The size of the file in bytes. */
  readonly size: number
  readonly #layout: ImageLayout
  readonly #guest: GuestReader
  readonly #pool = new ChunkPool()

  /** The image of `layout`, with the data that `guest` holds. The guest must not change. */
  constructor(layout: ImageLayout, guest: GuestReader) {
    this.size = layout.fileSize
    this.#layout = layout
    this.#guest = guest
  }

  /**
   * Fills `into` with the bytes of the file from `start` on: one read of the guest for each contiguous run of
   * its bytes, all at once. Rejects with the first error of a read, once every read has settled; throws
   * `QCOW2_ARGUMENT` for bytes outside the file.
   */
  async read(start: number, into: Uint8Array, options: ReadOptions = {}): Promise<void> {
    this.#checkRange(start, start + into.length)
    options.signal?.throwIfAborted()
    const { dataStart } = this.#layout
    const metadata = Math.max(0, Math.min(dataStart - start, into.length))
    if (metadata > 0) this.#layout.readMetadata(start, into.subarray(0, metadata))
    await this.#readData(start + metadata - dataStart, into.subarray(metadata), options)
  }

  /**
   * The bytes of the file, or of a range of it, as a stream of `Buffer`s in order. It is an object stream, so
   * that a chunk is handed on as it was filled, and reads ahead within fixed memory: `chunkSize` times
   * (`readAhead` + 1), and what the consumer keeps. A failed read of the guest destroys it with that error;
   * destroying it cancels the reads in flight.
   *
   * A consumer that is done with a chunk may give it back with {@link ComposedImage.recycle}.
   */
  stream(options: StreamOptions = {}): Readable {
    const { start = 0, end = this.size, signal, chunkSize = 1024 * 1024, readAhead = 16 } = options
    this.#checkRange(start, end)
    checkCount('chunkSize', chunkSize)
    checkCount('readAhead', readAhead)
    return new ChunkStream({
      read: (offset, into, readSignal) => this.read(offset, into, { signal: readSignal }),
      start,
      end,
      chunkSize,
      readAhead,
      pool: this.#pool,
      signal,
    })
  }

  /**
   * Takes back the memory of a chunk that {@link ComposedImage.stream} gave, to use it again. Nobody may touch
   * the chunk, or a part of it, any more. A chunk that is never given back is left to the garbage collector.
   */
  recycle(chunk: Uint8Array): void {
    this.#pool.give(chunk)
  }

  /** Fills `into` with bytes of the data area; `position` counts from its beginning. */
  async #readData(position: number, into: Uint8Array, options: ReadOptions): Promise<void> {
    const { map, clusterSize, extentsSize } = this.#layout
    const reads: Promise<void>[] = []
    let run = map.runOfData(Math.floor(position / clusterSize))
    for (let done = 0; done < into.length; run++) {
      if (!map.isData(run)) continue
      const inRun = position + done - map.dataBefore(run) * clusterSize
      const guestOffset = map.first(run) * clusterSize + inRun
      const end = Math.min(into.length, done + map.end(run) * clusterSize - guestOffset)
      const guestEnd = Math.min(end, done + Math.max(0, extentsSize - guestOffset))
      if (guestEnd > done) reads.push(this.#readGuest(guestOffset, into.subarray(done, guestEnd), options))
      if (reads.length === RUNS_AT_ONCE) await settled(reads.splice(0))
      into.fill(0, guestEnd, end) // the last cluster beyond the end of the disk
      done = end
    }
    await settled(reads)
  }

  /** A guest that throws is one that rejects. */
  async #readGuest(offset: number, into: Uint8Array, options: ReadOptions): Promise<void> {
    await this.#guest.read(offset, into, options)
  }

  #checkRange(start: number, end: number): void {
    if (
      Number.isSafeInteger(start) &&
      Number.isSafeInteger(end) &&
      start >= 0 &&
      start <= end &&
      end <= this.size
    )
      return
    throw new Qcow2Error(
      'QCOW2_ARGUMENT',
      `Bytes ${start} to ${end} are not within the image's ${this.size}.`,
      {
        start,
        end,
      },
    )
  }
}

/**
 * The most runs of one chunk that are read at a time. A stream reads many chunks at once; with all the runs of a scattered
 * disk beside them hundreds of reads wait for each other, so long that their promises outlive V8's young generation.
 */
const RUNS_AT_ONCE = 2

/** Waits for all, so that no read still writes to memory that the caller uses again; then throws the first error. */
async function settled(reads: readonly Promise<void>[]): Promise<void> {
  const results = await Promise.allSettled(reads)
  for (const result of results) if (result.status === 'rejected') throw result.reason
}

function checkCount(name: string, value: number): void {
  if (!Number.isSafeInteger(value) || value < 1)
    throw new Qcow2Error('QCOW2_ARGUMENT', `${name} is a whole number from 1, not ${value}.`, {
      [name]: value,
    })
}
