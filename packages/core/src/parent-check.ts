import type { Catalog, StoredBackup } from './backups.ts'
import { indexChains, missingObjects, walkChain } from './chain.ts'
import { backupOfKey, DELETION_PREFIX } from './storage-layout.ts'

/** Increments in a chain before a new full backup, unless a policy says otherwise. */
export const DEFAULT_MAX_INCREMENTAL_CHAIN = 30

/** Why no increment may rest on a backup, as far as the storage tells; undefined where one may. */
export function unfitParent(
  parent: StoredBackup,
  catalog: Catalog,
  maxIncrementalChain: number,
): 'parent-broken' | 'chain-limit' | undefined {
  const { links, problem } = walkChain(parent.folder, indexChains(catalog))
  const isGoing = [...catalog.objects.keys()].some(key =>
    key.startsWith(`${parent.folder}/${DELETION_PREFIX}`),
  )
  if (isGoing) return 'parent-broken' // its deletion is under way, or was cut short
  if (problem || links.some(link => missingObjects(link, catalog.objects).length > 0)) return 'parent-broken'
  return links.length - 1 >= maxIncrementalChain ? 'chain-limit' : undefined
}

/** The backups whose manifests cannot be used. */
export function damagedBackups({ damaged }: Catalog): Set<string> {
  return new Set(damaged.flatMap(({ key }) => backupOfKey(key)?.backup ?? []))
}
