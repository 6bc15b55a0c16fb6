import type { Catalog, StoredBackup } from './backups.ts'
import { indexChains, missingObjects, walkChain } from './chain.ts'
import { VarveError } from './errors.ts'
import type { FallbackReason } from './manifest.ts'
import { backupOfKey } from './storage-layout.ts'

/** When a chain ends and a new one begins. */
export interface ChainPolicy {
  /** Increments in a chain before a new full backup; 0 for none at all. Default: no limit. */
  maxIncrementalChain?: number
}

/** What the next backup of an instance is, as far as the storage tells. */
export type NextKind =
  | {
      readonly kind: 'full'
      /** Why it is no increment. */
      readonly reason: FallbackReason
    }
  | {
      readonly kind: 'incremental'
      /** What it rests on. */
      readonly parent: StoredBackup
    }

/** Decides by the instance's newest backup: it must be whole, with all that it rests on. */
export function nextKind(catalog: Catalog, { maxIncrementalChain = Infinity }: ChainPolicy): NextKind {
  if (!(maxIncrementalChain >= 0)) {
    throw new VarveError(
      'INVALID_ARGUMENT',
      `maxIncrementalChain is ${maxIncrementalChain}; it is not below 0.`,
      { context: { maxIncrementalChain } },
    )
  }
  const { backups, damaged, objects } = catalog
  const newest = backups.at(-1)
  const newestDamaged = damaged
    .map(({ key }) => backupOfKey(key)?.backup ?? '')
    .sort()
    .at(-1)
  if (!newest) return { kind: 'full', reason: newestDamaged === undefined ? 'no-parent' : 'parent-broken' }
  if (newestDamaged !== undefined && newestDamaged > newest.manifest.id) {
    return { kind: 'full', reason: 'parent-broken' }
  }
  const { links, problem } = walkChain(newest.folder, indexChains(catalog))
  if (problem || links.some(link => missingObjects(link, objects).length > 0)) {
    return { kind: 'full', reason: 'parent-broken' }
  }
  if (links.length - 1 >= maxIncrementalChain) return { kind: 'full', reason: 'chain-limit' }
  return { kind: 'incremental', parent: newest }
}
