import { type LayeredExtents, mergeLayers } from '@varve/qcow2'
import type { StoredBackup } from './backups.ts'
import { dataBytes } from './data-bytes.ts'
import { diskLayers } from './disk-chain.ts'
import type { DownloadRetry } from './download.ts'
import { abortError, errorMessage, isVarveError, VarveError } from './errors.ts'
import { openLayers } from './open-layers.ts'
import type { RestoreTarget } from './restore-target.ts'
import type { StorageDriver } from './storage.ts'
import { writeDisk } from './write-disk.ts'

/** Bytes of memory for what a restore downloads, unless it is told otherwise. */
export const RESTORE_MEMORY: number = 64 * 1024 * 1024

/** What {@link restoreDisk} restores, and to what. */
export interface RestoreDiskOptions {
  readonly storage: StorageDriver
  /** The full backup first, the one to restore last. */
  readonly chain: readonly StoredBackup[]
  /** The disk's name in the backups, such as `vda`. */
  readonly disk: string
  /** Makes the target. Called once all layers have been found whole and read; until then nothing is touched. */
  readonly createTarget: (merged: LayeredExtents) => Promise<RestoreTarget>
  /** The backup of the chain whose content the target has already: only what is newer is written. Default: none. */
  readonly base?: string
  /** Gives the restore up. */
  readonly signal?: AbortSignal
  /** Told of the bytes of data written so far, and of those to write in all; called first with 0. */
  readonly onProgress?: (bytesDone: number, bytesTotal: number) => void
  /** Bytes of memory for what is downloaded, whatever the chain's length and the disk's size. Default: 64 MiB. */
  readonly memory?: number
  /** Downloads at one time, where the storage can begin one anywhere. Default: 2. */
  readonly downloads?: number
  /** How downloads that break off go on. */
  readonly retry?: DownloadRetry
}

/**
 * Restores one disk of a backup in one pass: each stored block that holds something of the disk as it was is
 * downloaded and verified once, however long the chain, and each byte of the disk is written once.
 *
 * The target is finished only when every byte of the disk was verified and written; otherwise it is aborted.
 *
 * @throws DISK_NOT_FOUND, CHAIN_BROKEN, MANIFEST_INVALID, OBJECT_NOT_FOUND, SIZE_MISMATCH, DIGEST_MISMATCH,
 * IMAGE_INVALID, ABORTED, the storage's errors and the target's
 */
export async function restoreDisk(options: RestoreDiskOptions): Promise<void> {
  const { storage, onProgress, memory = RESTORE_MEMORY, downloads = 2, retry } = options
  const signal = options.signal ?? new AbortController().signal
  const layers = diskLayers(options.chain, options.disk)
  const { objects, images, pool } = await openLayers({ storage, layers, memory, signal, retry })
  const merged = mergeLayers(images)
  const base = layers.findIndex(({ backup }) => backup.manifest.id === options.base)
  const written = base < 0 ? objects : objects.slice(0, base)
  const bytesTotal = dataBytes(merged, written.length)
  let bytesDone = 0
  const onWritten = (bytes: number): void => {
    bytesDone += bytes
    onProgress?.(bytesDone, bytesTotal)
  }
  onWritten(0)
  const failureOf = (error: unknown) => (signal.aborted ? abortError(signal) : error)
  const target = await options.createTarget(merged).catch(error => {
    throw failureOf(error)
  })
  try {
    const seek = storage.capabilities.rangeRead
    await writeDisk({ merged, objects: written, pool, target, downloads, seek, onWritten, signal })
    await target.finish({ signal })
  } catch (error) {
    const failure = failureOf(error)
    await target.abort().catch((left: unknown) => {
      throw notRemoved(failure, left)
    })
    throw failure
  }
}

/** A restore that failed and could not clean up tells of both. */
function notRemoved(failure: unknown, left: unknown): VarveError {
  const message = `${errorMessage(failure)} What was written of it could not be removed: ${errorMessage(left)}`
  if (!isVarveError(failure)) return new VarveError('TARGET_FAILED', message, { cause: failure })
  const { code, context } = failure
  return new VarveError(code, message, { context, cause: failure })
}
