import type { LayeredExtents } from '@varve/qcow2'
import { dataBytes } from './data-bytes.ts'
import type { RestoreTarget } from './restore-target.ts'
import { type FileTargetOptions, TargetFile } from './target-file.ts'

/** A new raw file: sparse, zeros are holes. */
export class RawFileTarget implements RestoreTarget {
  readonly #file: TargetFile

  private constructor(file: TargetFile) {
    this.#file = file
  }

  /** Creates the file for the disk that `merged` describes. For its errors see {@link TargetFile.create}. */
  static async create(options: FileTargetOptions, merged: LayeredExtents): Promise<RawFileTarget> {
    return new RawFileTarget(await TargetFile.create(options, merged.size, dataBytes(merged)))
  }

  write(guestOffset: number, data: Uint8Array): Promise<void> {
    return this.#file.write(guestOffset, data)
  }

  /** What is not written is a hole. */
  zero(): Promise<void> {
    return Promise.resolve()
  }

  finish(): Promise<void> {
    return this.#file.finish()
  }

  abort(): Promise<void> {
    return this.#file.abort()
  }
}
