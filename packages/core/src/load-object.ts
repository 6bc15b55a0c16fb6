import { blake3Hex } from './digest.ts'
import { type DownloadRetry, download } from './download.ts'
import { VarveError } from './errors.ts'
import { assertRange, type ByteRange, type StorageDriver } from './storage.ts'

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

/**
 * Reads a range of an object into memory. Its caller has bounded the range.
 *
 * @throws INVALID_ARGUMENT for what is no range, as where a server tells a size that is none
 */
export async function loadObject(options: LoadOptions): Promise<Buffer> {
  const { range, onBytes } = options
  assertRange(range)
  // Not filled, so that it takes memory for what comes and not for what a storage says that it has.
  const bytes = Buffer.allocUnsafeSlow(range.end - range.start)
  let received = 0
  await download(options, {
    async write(chunk) {
      bytes.set(chunk, received)
      received += chunk.byteLength
      onBytes?.(chunk.byteLength)
    },
    restart: () => range.start + received,
  })
  return bytes
}

/** What {@link loadRecorded} reads. */
export interface RecordedOptions extends Omit<LoadOptions, 'range'> {
  /** The recorded size in bytes. */
  readonly size: number
  /** The recorded digest. */
  readonly blake3: string
  /** What an operator can do about other bytes. Default: what helps with any object. */
  readonly remedy?: string
}

/** Reads an object that a manifest records into memory. @throws DIGEST_MISMATCH for other bytes */
export async function loadRecorded(options: RecordedOptions): Promise<Buffer> {
  const { size, blake3, remedy, ...rest } = options
  const bytes = await loadObject({ ...rest, range: { start: 0, end: size } })
  if (blake3Hex(bytes) === blake3) return bytes
  throw otherBytes(options.key, remedy)
}

/** The error of an object that has another digest than the one recorded. */
export function otherBytes(
  key: string,
  remedy = 'Put it back from a copy of the storage, or use another backup.',
): VarveError {
  const message = `${key} is not what was stored: its digest is another one. ${remedy}`
  return new VarveError('DIGEST_MISMATCH', message, { context: { key } })
}
