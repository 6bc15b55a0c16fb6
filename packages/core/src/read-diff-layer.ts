import type { ImageLayer } from '@varve/qcow2'
import { markName } from './backup-plan.ts'
import type { StoredBackup } from './backups.ts'
import type { DownloadRetry } from './download.ts'
import { errorMessage, VarveError } from './errors.ts'
import { loadRecorded } from './load-object.ts'
import type { RbdManifestDisk } from './manifest.ts'
import { decodeDiffIndex } from './rbd-diff-index.ts'
import type { StorageDriver } from './storage.ts'
import { assertStoredSize } from './stored-size.ts'

/** What {@link readDiffLayer} reads. */
export interface DiffLayerOptions {
  readonly storage: StorageDriver
  readonly backup: StoredBackup
  readonly disk: RbdManifestDisk
  readonly signal: AbortSignal
  readonly retry?: DownloadRetry | undefined
}

/**
 * What a stored stream of `rbd export-diff` holds, by its index.
 *
 * @throws OBJECT_NOT_FOUND, SIZE_MISMATCH, DIGEST_MISMATCH, IMAGE_INVALID
 */
export async function readDiffLayer(options: DiffLayerOptions): Promise<ImageLayer> {
  const { storage, backup, disk, signal, retry } = options
  const { index, storedSize, virtualSize, backing } = disk
  const parent = disk.kind === 'incremental' ? backup.manifest.parent : undefined
  const key = `${backup.folder}/${index.key}`
  await assertStoredSize(storage, key, index.size, signal)
  const bytes = await loadRecorded({ storage, ...index, key, signal, retry })
  try {
    const diff = decodeDiffIndex(bytes)
    const said: [string, unknown, unknown][] = [
      ['disk size', diff.size, virtualSize],
      ['stream size', diff.streamSize, storedSize],
      ['snapshot', diff.toSnapshot, disk.snapshot.name],
      ['starting snapshot', diff.fromSnapshot, parent === undefined ? undefined : markName(parent)],
    ]
    const wrong = said.find(([, index, manifest]) => index !== manifest)
    if (wrong) throw new Error(`its ${wrong[0]} is ${wrong[1]}, the manifest says ${wrong[2]}`)
    return { virtualSize, extents: diff.extents, ...(backing !== undefined && { backing }) }
  } catch (error) {
    throw new VarveError(
      'IMAGE_INVALID',
      `${key} cannot be used: ${errorMessage(error)}. Restore another backup.`,
      { context: { key, backup: backup.manifest.id, disk: disk.name }, cause: error },
    )
  }
}
