import { basename } from 'node:path'
import { type Catalog, readCatalog, type StoredBackup } from './backups.ts'
import { brokenChains, chainOf, indexChains, missingObjects } from './chain.ts'
import { abortError, errorMessage, isVarveError, type VarveError } from './errors.ts'
import {
  assertGarbageAge,
  DEFAULT_GARBAGE_AGE_MS,
  findGarbage,
  type GarbageFolder,
  isStillGarbage,
} from './garbage.ts'
import { removeBackup } from './remove-backup.ts'
import { removeFolder } from './remove-folder.ts'
import { planRetention, type RetentionPolicy, type RetentionReason } from './retention.ts'
import type { RunOptions } from './run-options.ts'
import type { StorageDriver } from './storage.ts'
import { instanceFolder } from './storage-layout.ts'

/** What to prune, and what to keep of each instance. */
export interface PrunePolicy extends RetentionPolicy {
  /** Only this instance. Default: every one on the storage. */
  instance?: string
  /**
   * Milliseconds without a write after which a folder that has no manifest is garbage; at least an hour, and
   * above the time that the longest backup takes, but for those that the manager's `stateDir` knows of. Default: 24 hours.
   */
  garbageAgeMs?: number
}

/** How to prune. */
export interface PruneOptions extends RunOptions {
  /** Only tell what would be removed. Default: false. */
  dryRun?: boolean
  /** Gives up between two backups, or within one: what is left of it is garbage. */
  signal?: AbortSignal
}

/** A backup that is kept, and why. */
export interface KeptBackup {
  /** The backup. */
  readonly backup: StoredBackup
  /** Each rule that keeps it. */
  readonly reasons: readonly RetentionReason[]
}

/** A backup that is damaged. */
export interface DamagedBackup {
  /** `<instance>/<chain>/<id>` */
  readonly folder: string
  /** What is wrong with it. */
  readonly error: VarveError
}

/** What was pruned, or would be. */
export interface PruneReport {
  /** Whether nothing was removed in truth. */
  readonly dryRun: boolean
  /** Oldest first within an instance. */
  readonly kept: readonly KeptBackup[]
  /** In the order of removal: newest first within an instance. */
  readonly removed: readonly StoredBackup[]
  /** What is broken: the whole chain of each is kept until someone has looked at it. */
  readonly damaged: readonly DamagedBackup[]
  /** Leftovers that were removed. */
  readonly garbage: readonly GarbageFolder[]
  /** Unfinished uploads that the storage removed; a dry run does not ask for them. */
  readonly unfinishedUploads: number
}

/** What a prune is made with. */
export interface PruneRun {
  readonly dryRun: boolean
  /** By id, when the backups began that are not settled: what they have stored is no garbage, however old. */
  readonly running: ReadonlyMap<string, Date>
  readonly signal: AbortSignal
  /** Is waited for after each backup that was removed. */
  readonly onRemoved: (backup: StoredBackup) => Promise<void>
  /** Is told of what could not be tidied up. */
  readonly warn: (message: string) => void
}

/** Removes what a policy does not keep, children before their parents; then garbage. */
export async function prune(
  storage: StorageDriver,
  policy: PrunePolicy,
  run: PruneRun,
): Promise<PruneReport> {
  const { instance, garbageAgeMs = DEFAULT_GARBAGE_AGE_MS } = policy
  const { dryRun, running, signal } = run
  planRetention([], policy) // refuses a bad policy before anything is read
  assertGarbageAge(garbageAgeMs)

  const catalog = await readCatalog(
    storage,
    instance === undefined ? '' : `${instanceFolder(instance)}/`,
    signal,
  )
  const damaged = findDamage(catalog)
  const damagedChains = new Set(damaged.map(({ folder }) => chainOf(folder)))
  const { kept, removed } = applyPolicy(catalog.backups, damagedChains, policy)
  // A folder in a damaged chain may be a link that has lost its manifest.
  const garbage = findGarbage(catalog, garbageAgeMs).filter(
    ({ folder }) => !damagedChains.has(chainOf(folder)) && !running.has(basename(folder)),
  )

  const plan = { dryRun, kept, removed, damaged, garbage, unfinishedUploads: 0 }
  if (dryRun) return plan
  const { spared, ...gone } = await removeBackups(storage, plan.removed, catalog, run)
  const tidied = await tidyUp(storage, garbage, garbageAgeMs, run)
  return { ...plan, ...gone, ...tidied, kept: [...kept, ...spared] }
}

/** Removes backups, as far as they are still as they were when that was planned. */
async function removeBackups(
  storage: StorageDriver,
  planned: readonly StoredBackup[],
  catalog: Catalog,
  { signal, onRemoved }: PruneRun,
): Promise<{ removed: StoredBackup[]; spared: KeptBackup[] }> {
  const removed: StoredBackup[] = []
  const spared: KeptBackup[] = []
  const sparedChains = new Set<string>()
  for (const backup of planned) {
    const { folder } = backup
    const chain = chainOf(folder)
    if (!sparedChains.has(chain) && (await removeBackup(storage, folder, catalog.objects, signal))) {
      removed.push(backup)
      await onRemoved(backup)
      continue
    }
    // For one that was published meanwhile, which may be gone again: what is spared needs its ancestors all the same.
    sparedChains.add(chain)
    spared.push({ backup, reasons: ['ancestor'] })
  }
  return { removed, spared }
}

/**
 * Removes what is left over. What of it stays does not keep the report of the backups that are gone from its caller, and
 * nothing from being removed but by a storage that does not answer.
 */
async function tidyUp(
  storage: StorageDriver,
  leftovers: readonly GarbageFolder[],
  garbageAgeMs: number,
  { running, signal, warn }: PruneRun,
): Promise<Pick<PruneReport, 'garbage' | 'unfinishedUploads'>> {
  const garbage: GarbageFolder[] = []
  let unfinishedUploads = 0
  const stays = (what: string, error: unknown): boolean => {
    if (signal.aborted) throw abortError(signal)
    warn(`${what} until a later prune: ${errorMessage(error)}`)
    return isVarveError(error) && error.retryable
  }
  for (const leftover of leftovers) {
    const { folder } = leftover
    try {
      if (!(await isStillGarbage(storage, folder, garbageAgeMs, signal))) continue
      await removeFolder(storage, folder, signal)
      garbage.push(leftover)
    } catch (error) {
      if (stays(`What is left over in ${folder} stays`, error)) return { garbage, unfinishedUploads }
    }
  }
  const begun = [...running.values()].map(time => time.getTime())
  const olderThan = new Date(Math.min(Date.now() - garbageAgeMs, ...begun))
  try {
    unfinishedUploads = (await storage.cleanUp?.({ olderThan, signal })) ?? 0
  } catch (error) {
    stays('Unfinished uploads may stay', error)
  }
  return { garbage, unfinishedUploads }
}

/** Backups whose manifest, chain or objects are not as they should be. */
function findDamage(catalog: Catalog): DamagedBackup[] {
  const index = indexChains(catalog)
  const broken = brokenChains(index)
  return [
    ...[...index.damaged].map(([folder, error]) => ({ folder, error })),
    ...catalog.backups.flatMap(backup => {
      const { folder } = backup
      const error = broken.get(folder) ?? missingObjects(backup, catalog.objects)[0]
      return error ? [{ folder, error }] : []
    }),
  ]
}

function applyPolicy(
  backups: readonly StoredBackup[],
  damagedChains: ReadonlySet<string>,
  policy: RetentionPolicy,
): Pick<PruneReport, 'kept' | 'removed'> {
  const kept: KeptBackup[] = []
  const removed: StoredBackup[] = []
  for (const [, ofInstance] of Map.groupBy(backups, ({ manifest }) => manifest.instance.name)) {
    const byId = new Map(ofInstance.map(backup => [backup.manifest.id, backup]))
    const items = ofInstance.map(({ manifest, folder }) => ({
      id: manifest.id,
      startedAt: new Date(manifest.startedAt),
      owner: manifest.instance.uuid, // a name may be that of two instances, of two hosts or one after the other
      ...(manifest.parent !== undefined && { parent: manifest.parent }),
      damaged: damagedChains.has(chainOf(folder)),
    }))
    const plan = planRetention(items, policy)
    for (const { id, reasons } of plan.keep) {
      const backup = byId.get(id)
      if (backup) kept.push({ backup, reasons })
    }
    for (const id of plan.remove) {
      const backup = byId.get(id)
      if (backup) removed.push(backup)
    }
  }
  return { kept, removed }
}
