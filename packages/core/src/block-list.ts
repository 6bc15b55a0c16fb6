import { DIGEST_LENGTH } from './digest.ts'
import type { DownloadRetry } from './download.ts'
import { loadRecorded } from './load-object.ts'
import type { ObjectDigest } from './manifest.ts'
import type { StorageDriver } from './storage.ts'
import { assertStoredSize } from './stored-size.ts'

/** What {@link loadBlockList} reads. */
export interface BlockListOptions {
  readonly storage: StorageDriver
  /** Key of the list. */
  readonly key: string
  /** Size in bytes of the object that the list belongs to. */
  readonly size: number
  readonly digest: ObjectDigest
  readonly signal: AbortSignal
  readonly retry?: DownloadRetry | undefined
}

/**
 * The digests of an object's blocks, 32 bytes each, one after the other; checked against the object's root
 * digest. `SIZE_MISMATCH` where it is too short or too long, `DIGEST_MISMATCH` where it is another list.
 */
export async function loadBlockList(options: BlockListOptions): Promise<Uint8Array> {
  const { storage, key, size, digest, signal } = options
  const length = Math.ceil(size / digest.blockSize) * DIGEST_LENGTH
  await assertStoredSize(storage, key, length, signal)
  return loadRecorded({ storage, key, size: length, blake3: digest.root, signal, retry: options.retry })
}
