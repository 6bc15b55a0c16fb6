import { type FileHandle, open } from 'node:fs/promises'
import type { GuestReader, ReadOptions } from '@varve/qcow2'
import { abortError, errorMessage, VarveError } from './errors.ts'
import { ImageMap } from './image-map.ts'
import { readImageMap } from './read-image-map.ts'
import { emit, type RunOptions } from './run-options.ts'

/** Runs of the map that are compared with what the server gives, and the most bytes of each. */
const SAMPLES = 16
const SAMPLE_BYTES = 4096

/**
 * The most parts of one read that are read at a time. Many reads are under way beside each other; with all the parts of a
 * scattered image hundreds would be, and wait so long that their promises outlive V8's young generation.
 */
const PARTS_AT_ONCE = 4

/** What {@link ImageReader.open} reads. */
export interface ImageReaderOptions extends RunOptions {
  /** The disk's name, for messages. */
  readonly disk: string
  /** Image file or block device, to which nobody writes until the reader is disposed of. */
  readonly path: string
  readonly format: 'qcow2' | 'raw'
  /** The size of the disk in bytes. */
  readonly size: number
  /** The same disk as `qemu-nbd` serves it. */
  readonly server: GuestReader
  /** Runs that are read from the file, the first ones of the disk; the rest the server gives. Default: 262,144. */
  readonly mostRuns?: number
}

/**
 * A frozen disk, read straight from its image file where that holds the bytes as they are, and from the server
 * where it does not. A server costs two copies of each byte more, on the way into a socket and out of it, and
 * half of a backup's processor time.
 */
export class ImageReader implements GuestReader, Disposable {
  readonly #file: FileHandle | undefined
  readonly #map: ImageMap
  readonly #server: GuestReader

  private constructor(server: GuestReader, map: ImageMap, file?: FileHandle) {
    this.#server = server
    this.#map = map
    this.#file = file
  }

  /** Where the file cannot be read so, everything is read from the server, and a `warning` event says why. */
  static async open(options: ImageReaderOptions): Promise<ImageReader> {
    const { disk, path, format, size, server, signal } = options
    let file: FileHandle | undefined
    try {
      file = await open(path)
      const map = format === 'raw' ? wholeDisk(size) : await readImageMap(file, path, options)
      const reader = new ImageReader(server, map, file)
      await reader.#assertSame(path, signal ? { signal } : {})
      return reader
    } catch (error) {
      await file?.close()
      if (signal?.aborted) throw error
      const message = `The disk ${disk} is read through qemu-nbd alone, which takes longer: ${errorMessage(error)}`
      emit(options, { type: 'warning', message })
      return new ImageReader(server, new ImageMap())
    }
  }

  async read(offset: number, into: Uint8Array, options: ReadOptions = {}): Promise<void> {
    const reads: Promise<void>[] = []
    for (let done = 0; done < into.length; ) {
      const { fileOffset, length } = this.#map.at(offset + done)
      const part = into.subarray(done, done + length)
      reads.push(
        fileOffset === undefined
          ? this.#server.read(offset + done, part, options)
          : this.#readFile(fileOffset, offset + done, part, options),
      )
      done += part.length
      if (reads.length === PARTS_AT_ONCE) await settled(reads.splice(0))
    }
    await settled(reads)
  }

  [Symbol.dispose](): void {
    // Not awaited: it waits for a read that a hanging mount may never answer. Closing what was only read tells
    // nothing of the bytes.
    this.#file?.close().catch(() => undefined)
  }

  /** What the file does not give, since it ends before a cluster does or is damaged, is the server's to give or refuse. */
  async #readFile(position: number, offset: number, into: Uint8Array, options: ReadOptions): Promise<void> {
    for (let done = 0; done < into.length; ) {
      if (options.signal?.aborted) throw abortError(options.signal)
      const read = this.#file?.read(into, done, into.length - done, position + done)
      const bytesRead = await read?.then(
        result => result.bytesRead,
        () => 0,
      )
      if (!bytesRead) return this.#server.read(offset + done, into.subarray(done), options)
      done += bytesRead
    }
  }

  /** A map that is wrong would make a wrong backup: some runs of it are read both ways. */
  async #assertSame(path: string, options: ReadOptions): Promise<void> {
    const step = Math.max(1, this.#map.count / SAMPLES)
    const samples: Promise<void>[] = []
    for (let at = 0; at < this.#map.count; at += step) {
      const { start, length } = this.#map.run(Math.floor(at))
      samples.push(this.#assertSameAt(start, Math.min(length, SAMPLE_BYTES), path, options))
    }
    await Promise.all(samples)
  }

  async #assertSameAt(offset: number, length: number, path: string, options: ReadOptions): Promise<void> {
    const [direct, served] = [Buffer.alloc(length), Buffer.alloc(length)]
    await Promise.all([this.read(offset, direct, options), this.#server.read(offset, served, options)])
    if (direct.equals(served)) return
    throw new VarveError('IMAGE_INVALID', `qemu-nbd gives other bytes at ${offset} than ${path} holds.`, {
      context: { path, offset },
    })
  }
}

/** Waits for all, so that no read still writes to memory that the caller uses again; then throws the first error. */
async function settled(reads: readonly Promise<void>[]): Promise<void> {
  for (const result of await Promise.allSettled(reads)) if (result.status === 'rejected') throw result.reason
}

function wholeDisk(size: number): ImageMap {
  const map = new ImageMap()
  if (size > 0) map.append(0, size, 0)
  return map
}
