import { type DownloadRetry, download } from './download.ts'
import type { ByteRange, StorageDriver } from './storage.ts'

/** What {@link loadObject} reads. */
export interface LoadOptions {
  readonly storage: StorageDriver
  readonly key: string
  /** Which bytes; all of them must be there. */
  readonly range: ByteRange
  readonly signal: AbortSignal
  readonly retry?: DownloadRetry | undefined
  /** Is told of every chunk's length. */
  readonly onBytes?: (length: number) => void
}

/** Reads a range of an object into memory. Its caller has bounded the range. */
export async function loadObject(options: LoadOptions): Promise<Buffer> {
  const { range, onBytes } = options
  const chunks: Uint8Array[] = [] // memory for what comes, not for what a storage says that it has
  let received = 0
  await download(options, {
    async write(chunk) {
      chunks.push(Uint8Array.prototype.slice.call(chunk)) // its memory is used again
      received += chunk.byteLength
      onBytes?.(chunk.byteLength)
    },
    restart: () => range.start + received,
  })
  return Buffer.concat(chunks, received)
}
