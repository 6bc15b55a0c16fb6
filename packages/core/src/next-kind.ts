import type { Catalog, StoredBackup } from './backups.ts'
import { VarveError } from './errors.ts'
import type { FallbackReason } from './manifest.ts'
import { DEFAULT_MAX_INCREMENTAL_CHAIN, damagedBackups, unfitParent } from './parent-check.ts'

/** When a chain ends and a new one begins. */
export interface ChainPolicy {
  /** Increments in a chain before a new full backup; 0 for none at all. Default: 30. */
  maxIncrementalChain?: number
}

/** What the next backup of an instance is, as far as the storage tells. */
export type NextKind =
  | {
      /** All disks get a full image. */
      readonly kind: 'full'
      /** Why it is no increment. */
      readonly reason: FallbackReason
    }
  | {
      /** The disks get an increment as far as their bitmaps and snapshots allow. */
      readonly kind: 'incremental'
      /** What it rests on. */
      readonly parent: StoredBackup
    }

/**
 * Decides by the instance's newest backup, whose bitmaps its disks carry unless something came in between: it
 * must be whole, with all that it rests on.
 */
export function nextKind(catalog: Catalog, policy: ChainPolicy): NextKind {
  const { maxIncrementalChain = DEFAULT_MAX_INCREMENTAL_CHAIN } = policy
  if (!(maxIncrementalChain >= 0)) {
    throw new VarveError(
      'INVALID_ARGUMENT',
      `maxIncrementalChain is ${maxIncrementalChain}; it is not below 0.`,
      { context: { maxIncrementalChain } },
    )
  }
  const newest = catalog.backups.at(-1)
  const newestDamaged = [...damagedBackups(catalog)].sort().at(-1)
  if (newestDamaged !== undefined && !(newest && newestDamaged < newest.manifest.id)) {
    return { kind: 'full', reason: 'parent-broken' }
  }
  if (!newest) return { kind: 'full', reason: 'no-parent' }
  const { disks } = newest.manifest
  if (!disks.some(disk => disk.format === 'rbd-diff' || disk.bitmap)) {
    const isRaw = disks.some(({ source }) => source.format === 'raw')
    return { kind: 'full', reason: isRaw ? 'format-raw' : 'format-qcow2-v2' }
  }
  const reason = unfitParent(newest, catalog, maxIncrementalChain)
  return reason ? { kind: 'full', reason } : { kind: 'incremental', parent: newest }
}
