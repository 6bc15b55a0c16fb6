import { ExtentKind, ExtentList, type ImageLayout, type LayeredExtents, planImage } from '@varve/qcow2'
import { errorMessage, VarveError } from './errors.ts'
import type { RestoreTarget } from './restore-target.ts'
import { type FileTargetOptions, TargetFile } from './target-file.ts'

const METADATA_CHUNK = 1024 * 1024

/** Options of {@link Qcow2FileTarget.create}. */
export interface Qcow2TargetOptions extends FileTargetOptions {
  /** Bytes in a cluster: a power of two from 4096 to 2097152. Default: 65536. */
  readonly clusterSize?: number
}

/**
 * A new qcow2 file without a backing file. It is laid out before the first write, so that data goes straight to
 * its place; the tables are written last, and until then the file is no image.
 */
export class Qcow2FileTarget implements RestoreTarget {
  readonly #file: TargetFile
  readonly #layout: ImageLayout

  private constructor(file: TargetFile, layout: ImageLayout) {
    this.#file = file
    this.#layout = layout
  }

  /** Creates the file for the disk that `merged` describes. For its errors see {@link TargetFile.create}. */
  static async create(options: Qcow2TargetOptions, merged: LayeredExtents): Promise<Qcow2FileTarget> {
    const { clusterSize = 65536 } = options
    const layout = planned(merged, clusterSize)
    return new Qcow2FileTarget(await TargetFile.create(options, layout.fileSize, layout.fileSize), layout)
  }

  async write(guestOffset: number, data: Uint8Array): Promise<void> {
    const position = this.#layout.fileOffset(guestOffset)
    if (position === undefined) throw new RangeError(`Byte ${guestOffset} of the disk is no data.`)
    await this.#file.write(position, data)
  }

  /** A cluster without data reads as zeros, and so does what is not written of one with data. */
  zero(): Promise<void> {
    return Promise.resolve()
  }

  async finish(): Promise<void> {
    const { dataStart } = this.#layout
    const chunk = new Uint8Array(Math.min(METADATA_CHUNK, dataStart))
    for (let start = 0; start < dataStart; start += chunk.length) {
      const bytes = chunk.subarray(0, Math.min(chunk.length, dataStart - start))
      this.#layout.readMetadata(start, bytes)
      await this.#file.write(start, bytes)
    }
    await this.#file.finish()
  }

  async abort(): Promise<void> {
    await this.#file.abort()
  }
}

/** The sizes come from a storage, which may say anything. */
function planned(merged: LayeredExtents, clusterSize: number): ImageLayout {
  try {
    return planImage(flattened(merged, clusterSize), { clusterSize })
  } catch (error) {
    const message = `The disk of ${merged.size} bytes cannot be a qcow2 image: ${errorMessage(error)} Restore it as raw, or in place.`
    throw new VarveError('TARGET_FAILED', message, {
      context: { size: merged.size, clusterSize },
      cause: error,
    })
  }
}

/** The disk in clusters of one size: a cluster that has any data is data, all others are nothing. */
function flattened(merged: LayeredExtents, clusterSize: number): ExtentList {
  const extents = new ExtentList()
  for (let i = 0; i < merged.count; i++) {
    if (merged.layer(i) < 0) continue
    const end = merged.start(i) + merged.length(i)
    const start = Math.max(extents.size, Math.floor(merged.start(i) / clusterSize) * clusterSize)
    const clusterEnd = Math.min(Math.ceil(end / clusterSize) * clusterSize, merged.size)
    extents.append(start - extents.size, ExtentKind.unallocated)
    extents.append(Math.max(0, clusterEnd - start), ExtentKind.data)
  }
  extents.append(merged.size - extents.size, ExtentKind.unallocated)
  return extents
}
