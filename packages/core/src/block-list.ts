import { DIGEST_LENGTH } from './digest.ts'
import type { DownloadRetry } from './download.ts'
import { VarveError } from './errors.ts'
import { loadRecorded } from './load-object.ts'
import type { ObjectDigest } from './manifest.ts'
import type { StorageDriver } from './storage.ts'
import { assertStoredSize } from './stored-size.ts'

/** The largest list of block digests, in bytes: that of an image of 128 TiB in blocks of 4 MiB. */
export const BLOCK_LIST_MAX_BYTES: number = 1024 * 1024 * 1024

/** How long the list of an object's block digests is, in bytes. */
export function blockListBytes(size: number, { blockSize }: Pick<ObjectDigest, 'blockSize'>): number {
  return Math.ceil(size / blockSize) * DIGEST_LENGTH
}

/**
 * Refuses lists of so many bytes together where they do not fit in the memory that is left. Their sizes come from a
 * storage, where a file of holes costs nothing.
 *
 * @throws INVALID_ARGUMENT
 */
export function assertListsFit(needed: number): void {
  const available = process.availableMemory()
  if (needed <= available / 2) return
  throw new VarveError(
    'INVALID_ARGUMENT',
    `The lists of block digests of this backup take ${needed} bytes of memory, and ${available} are available, of which half may be used. Use a machine with more memory, or a backup with a shorter chain.`,
    { context: { needed, available } },
  )
}

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
  const length = blockListBytes(size, digest)
  await assertStoredSize(storage, key, length, signal)
  return loadRecorded({ storage, key, size: length, blake3: digest.root, signal, retry: options.retry })
}
