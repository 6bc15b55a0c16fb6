import { isVarveError } from './errors.ts'
import type { DiskBitmapChange } from './host.ts'

/** Changes the bitmaps of one disk after the other, where one that fails keeps no other from it. */
export async function changeEach(
  changes: readonly DiskBitmapChange[],
  work: (change: DiskBitmapChange) => Promise<void>,
): Promise<void> {
  const failures: unknown[] = []
  for (const change of changes) {
    await work(change).catch(error => {
      // An instance, or a disk of it, that is gone took its bitmaps along.
      if (!isVarveError(error, 'INSTANCE_NOT_FOUND') && !isVarveError(error, 'DISK_NOT_FOUND'))
        failures.push(error)
    })
  }
  if (failures.length > 0) throw failures[0]
}
