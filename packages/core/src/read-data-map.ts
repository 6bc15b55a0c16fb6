import type { BackupContext } from './backup-context.ts'
import { type DataMap, decodeDataMap } from './data-map.ts'
import { type ErrorCode, isVarveError, VarveError } from './errors.ts'
import { loadRecorded } from './load-object.ts'
import { emit } from './run-options.ts'
import { assertStoredSize } from './stored-size.ts'

/** What is wrong with the map itself, and not with the way to it. */
const DAMAGED: ReadonlySet<ErrorCode> = new Set([
  'DIGEST_MISMATCH',
  'IMAGE_INVALID',
  'OBJECT_NOT_FOUND',
  'SIZE_MISMATCH',
])

/**
 * Where a disk had data at the parent of a backup. Without it, as it was damaged or the parent has none, an increment
 * says of all that reads as zero that it does: it is larger, and right.
 */
export async function readDataMap(
  { plan, storage, run }: BackupContext,
  disk: string,
  size: number,
  signal: AbortSignal,
): Promise<DataMap | undefined> {
  const before = plan.parent?.manifest.disks.find(({ name }) => name === disk)
  const map = before?.format === 'qcow2' ? before.map : undefined
  if (!plan.parent || !map) return undefined
  const key = `${plan.parent.folder}/${map.key}`
  try {
    await assertStoredSize(storage, key, map.size, signal)
    const decoded = decodeDataMap(await loadRecorded({ storage, ...map, key, signal }))
    if (decoded.size === size) return decoded
    throw new VarveError('IMAGE_INVALID', `${key} is of a disk of ${decoded.size} bytes, not ${size}.`, {
      context: { key },
    })
  } catch (error) {
    if (!isVarveError(error) || !DAMAGED.has(error.code)) throw error
    const message = `The increment of ${disk} goes without the map of its parent's data and is larger: ${error.message} Verify the parent.`
    emit(run, { type: 'warning', message })
    return undefined
  }
}
