import {
  type BackupListing,
  backupNotFound,
  type Catalog,
  type FindOptions,
  hasManifest,
  listBackups,
  locateBackup,
  readCatalog,
  type StoredBackup,
} from './backups.ts'
import { type ChainWalk, indexChains, walkChain } from './chain.ts'
import { deleteBackup } from './delete-backup.ts'
import { isVarveError, VarveError } from './errors.ts'
import type { Host } from './host.ts'
import { RunJournal } from './journal.ts'
import { type ChainPolicy, type NextKind, nextKind } from './next-kind.ts'
import { type PruneOptions, type PrunePolicy, type PruneReport, prune } from './prune.ts'
import { type RemoveSnapshotsOptions, removeSnapshotsOf } from './remove-snapshots.ts'
import { emit, type RunOptions } from './run-options.ts'
import type { CallOptions, StorageDriver } from './storage.ts'
import { instanceFolder, MANIFEST_FILE } from './storage-layout.ts'
import { tellCommands } from './tell-commands.ts'
import { type VerifyProgress, type VerifyReport, verifyChain } from './verify-chain.ts'

const never: AbortSignal = new AbortController().signal

/** What a {@link ChainManager} works with. */
export interface ChainManagerOptions {
  /** Where the backups are. */
  storage: StorageDriver
  /**
   * Where the instances live. With it and `stateDir`, `delete` and `prune` also remove the snapshots of what they delete
   * from RBD images. Default: those go with the next backup from the machine that took them to the same storage.
   */
  host?: Host
  /**
   * The state folder of the pipelines, which belongs to `host`: only snapshots of backups that went from this machine to
   * this storage, by its records, are removed. A storage is not believed whose snapshots those are. What a backup stores
   * that it knows to be running, or not settled, is no garbage, however long that takes.
   */
  stateDir?: string
}

/** How to verify. */
export interface VerifyOptions extends CallOptions {
  /** Read every byte and compare it with its digest. Default: false, only sizes and manifests. */
  deep?: boolean
  /** Is told how far a deep verification is, a few times a second and at its end. What it throws, or rejects with, is ignored. */
  onProgress?: (progress: VerifyProgress) => void
}

/**
 * The backups on one storage and the chains that they form. The storage is all that it looks at: a lost
 * database loses no backup. Every method throws what the storage throws, and ABORTED after an abort.
 */
export class ChainManager {
  readonly #storage: StorageDriver
  readonly #snapshots: RemoveSnapshotsOptions | undefined

  /** @throws INVALID_ARGUMENT for a `host` without a `stateDir`, or the other way round */
  constructor({ storage, host, stateDir }: ChainManagerOptions) {
    if ((host === undefined) !== (stateDir === undefined)) {
      throw new VarveError(
        'INVALID_ARGUMENT',
        'A ChainManager needs host and stateDir together: what the state folder of the pipelines knows is what snapshots of RBD images are removed by. Give both, or neither.',
      )
    }
    this.#storage = storage
    this.#snapshots = host && stateDir !== undefined ? { host, stateDir, storage } : undefined
  }

  /** The backups on the storage, oldest first, and the manifests that cannot be used. */
  list(options: FindOptions = {}): Promise<BackupListing> {
    return listBackups(this.#storage, options)
  }

  /**
   * A backup and all that it rests on: the full backup first, the backup itself last.
   *
   * @throws BACKUP_NOT_FOUND
   * @throws MANIFEST_INVALID, MANIFEST_VERSION where the backup's own manifest cannot be used
   * @throws CHAIN_BROKEN where a link is missing, cannot be used, or is not what the next one rests on
   */
  async resolve(backupId: string, options: CallOptions = {}): Promise<StoredBackup[]> {
    const storage = tellCommands(this.#storage, options.onCommand)
    const { links, problem } = (await walkOf(storage, backupId, options.signal)).walk
    if (problem) throw problem
    return links
  }

  /**
   * What the next backup of an instance is, as far as the storage tells: what BackupPipeline decides, with the
   * same rules and the same default limit, for disks that carry the bitmap of the newest backup. It differs
   *
   * - where a disk's own state asks for a full image: its bitmap is missing or not usable, or the disk is new,
   *   shrunk or of another format by now; a fallback is told for each disk;
   * - where the disks carry the bitmap of an older backup, as after a restore of it, or when the newest has
   *   other disks: the pipeline's parent is then the newest backup of which one of them has the bitmap, and
   *   it is that one's chain which counts.
   *
   * @throws INVALID_ARGUMENT
   */
  async nextKind(instance: string, policy: ChainPolicy = {}, options: CallOptions = {}): Promise<NextKind> {
    const storage = tellCommands(this.#storage, options.onCommand)
    return nextKind(await readCatalog(storage, `${instanceFolder(instance)}/`, options.signal), policy)
  }

  /**
   * Looks for damage to a backup and all that it rests on, and collects every problem. Without `deep`: the
   * manifests are valid and form a chain, and every object is there with its recorded size. With `deep` also:
   * every byte has its recorded digest, and each qcow2 image is what its manifest says, down to its backing file.
   *
   * @throws BACKUP_NOT_FOUND, also where it is deleted meanwhile, and MANIFEST_INVALID where two folders have one of this id;
   * damage is reported, not thrown
   */
  async verify(backupId: string, options: VerifyOptions = {}): Promise<VerifyReport> {
    const { deep = false, signal = never, onProgress, onCommand } = options
    const storage = tellCommands(this.#storage, onCommand)
    const { walk, objects, folder } = await walkOf(storage, backupId, signal)
    const report = await verifyChain({ storage, backup: backupId, walk, objects, deep, signal, onProgress })
    // A deletion takes its manifest first, then what it rests on: what is missing by then is no damage.
    const isThere = report.ok || (await storage.stat(`${folder}/${MANIFEST_FILE}`, { signal }))
    if (!isThere) throw backupNotFound(storage, backupId)
    return report
  }

  /**
   * Removes a backup. Its manifest goes first: a deletion that breaks off leaves garbage and no broken backup.
   * A manifest that cannot be read does not tell its parent, so it protects every older backup of its chain.
   * A snapshot that is not removed, as the cluster is away, the disk is held by a run or the backup did not go from here
   * to this storage, is told of by a warning.
   *
   * @throws BACKUP_NOT_FOUND, also for an upload under way
   * @throws CHAIN_DEPENDENCY where other backups rest on it: `context.children` has their ids, newest first
   */
  async delete(backupId: string, options: RunOptions = {}): Promise<void> {
    const storage = tellCommands(this.#storage, options.onEvent)
    const running = await this.#runningBackups()
    const deleted = await deleteBackup(storage, backupId, new Set(running.keys()), options.signal ?? never)
    if (deleted && this.#snapshots) await removeSnapshotsOf(deleted.manifest, this.#snapshots, options)
  }

  /**
   * Removes the backups that a policy does not keep, then the folders that were left over without a manifest.
   * A backup on which a kept one rests is kept. A chain in which anything is damaged is left alone and
   * reported, and does not count towards what is kept. What cannot be removed of the leftovers is told of by a warning.
   *
   * @throws INVALID_ARGUMENT for a policy that keeps nothing
   */
  async prune(policy: PrunePolicy, options: PruneOptions = {}): Promise<PruneReport> {
    const { dryRun = false, ...run } = options
    const storage = tellCommands(this.#storage, run.onEvent)
    const running = await this.#runningBackups()
    return prune(storage, policy, {
      dryRun,
      running,
      signal: run.signal ?? never,
      onRemoved: async ({ manifest }) => {
        if (this.#snapshots) await removeSnapshotsOf(manifest, this.#snapshots, run)
      },
      warn: message => emit(run, { type: 'warning', message }),
    })
  }

  /**
   * The backups of this machine whose uploads may be under way, and when they began, which the id does not tell that
   * follows one from a clock that was ahead. Where a run cannot be read, all runs may be such, from any time on.
   */
  async #runningBackups(): Promise<ReadonlyMap<string, Date>> {
    if (!this.#snapshots) return new Map()
    const { stateDir } = this.#snapshots
    const headers = await RunJournal.headers(stateDir).catch(error => {
      if (isVarveError(error, 'RUN_UNRESOLVED')) return undefined
      throw error
    })
    if (!headers) return new Map((await RunJournal.unsettled(stateDir)).map(id => [id, new Date(0)]))
    const backups = headers.filter(({ kind }) => kind === 'backup')
    return new Map(backups.map(({ id, startedAt }) => [id, new Date(Date.parse(startedAt) || 0)]))
  }
}

async function walkOf(
  storage: StorageDriver,
  backupId: string,
  signal: AbortSignal = never,
): Promise<{ walk: ChainWalk; objects: Catalog['objects']; folder: string }> {
  const located = await locateBackup(storage, backupId, signal)
  if (!hasManifest(located)) throw backupNotFound(storage, backupId)
  const { folder, chain } = located
  return { walk: walkChain(folder, indexChains(chain)), objects: chain.objects, folder }
}
