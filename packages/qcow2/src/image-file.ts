import type { ReadOptions } from './composed-image.ts'

/** A file of known size that is read by ranges: an image on a storage. */
export interface ImageFile {
  /** In bytes. */
  readonly size: number
  /**
   * Fills all of `into` with the file's bytes from `offset` on, which are within `size`. May be called several
   * times at once. It settles only when nothing writes to `into` any more.
   */
  read(offset: number, into: Uint8Array, options?: ReadOptions): Promise<void>
}
