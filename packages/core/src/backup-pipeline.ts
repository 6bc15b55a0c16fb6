import { type BackupContext, stage } from './backup-context.ts'
import { backupTime, newBackupId } from './backup-id.ts'
import {
  assertClustersFit,
  type BackupPlan,
  bitmapsToRetire,
  chooseDisks,
  DEFAULT_CLUSTER_SIZE,
  DEFAULT_RBD_SNAPSHOTS,
  type DiskSelection,
  fallbackMessage,
  goneBackups,
  marksOfBackups,
  planBackup,
  snapshotsToRetire,
} from './backup-plan.ts'
import { freeze, mark, planOverlays, recordBases, stream } from './backup-stages.ts'
import { readCatalog, type StoredBackup } from './backups.ts'
import { DiskLock, runLock } from './disk-lock.ts'
import { isVarveError, runError, VarveError } from './errors.ts'
import { type Host, type HostDisk, type Instance, isFileDisk } from './host.ts'
import { RunJournal } from './journal.ts'
import { recordLateOverlays } from './late-overlays.ts'
import type { BackupManifest } from './manifest.ts'
import { MarkLedger } from './mark-ledger.ts'
import { OverlayWatch } from './overlay-space.ts'
import { DEFAULT_MAX_INCREMENTAL_CHAIN } from './parent-check.ts'
import { describe, publish, storeDefinition } from './publish-backup.ts'
import { emit, type RunOptions } from './run-options.ts'
import { settleBackup, settleError } from './settle-backup.ts'
import { statIfThere } from './stat-if-there.ts'
import type { StorageDriver } from './storage.ts'
import { StorageCalls } from './storage-calls.ts'
import { backupFolder, instanceFolder } from './storage-layout.ts'
import { tellCommands } from './tell-commands.ts'
import { assertNoUnsettledRun } from './unsettled.ts'

const SECTOR_SIZE = 512
/** How far ahead an id may be before that is told, in milliseconds: one day. */
const CLOCK_TOLERANCE_MS = 24 * 60 * 60 * 1000

/** What a {@link BackupPipeline} works with. */
export interface BackupPipelineOptions {
  /** Where the instance lives. */
  host: Host
  /** Where the backup goes. Without one every run fails with BACKUP_NOT_ENABLED. */
  storage: StorageDriver | undefined
  /** A folder on this machine's own disk for the journals of runs, such as `/var/lib/varve`. */
  stateDir: string
}

/** One backup to take. */
export interface BackupRequest {
  /** The instance's name. */
  instance: string
  /**
   * `auto`: incremental where there is a backup to build on. `incremental`: the same, but an error where
   * there has been no backup at all. Either falls back to a full image, disk by disk, for a typed reason.
   * Default: `auto`.
   */
  type?: 'auto' | 'full' | 'incremental'
  /** Default: `all`. */
  disks?: DiskSelection
  /** Increments in a chain before a new full backup. Default: 30. */
  maxIncrementalChain?: number
  /**
   * Whether the guest agent flushes and freezes the file systems for the moment of the snapshot. `try`: a
   * failure is a warning and the backup is crash-consistent. `require`: a failure ends the run. Default: `off`.
   */
  freeze?: 'off' | 'try' | 'require'
  /**
   * Bytes that stay free in the file systems of the overlays and of the disks while a running instance is backed up;
   * below, the backup is given up (OVERLAY_SPACE_LOW) before the guest has to stop. Default: 1 GiB, or 5 % of a file
   * system that is smaller than 20 GiB.
   */
  overlayReserve?: number
  /** Bytes a second for all disks together. Default: no limit. */
  bandwidth?: number
  /** Disks that are streamed at the same time. Default: 2. */
  concurrency?: number
  /** Bytes of a cluster of the images: a power of two from 4096 to 2 MiB. Default: 65,536. */
  clusterSize?: number
  /**
   * Snapshots that stay on each RBD image after a backup, its own and older ones of the same storage: as many backups
   * can still be built on. At least 1. Default: 2.
   */
  rbdSnapshots?: number
  /**
   * What is checked at the storage before the backup is published. `size`: that every object is there with
   * its size. `digest`: every object is also read back and digested. The manifest always is. Default: `size`.
   */
  verifyUpload?: 'size' | 'digest'
}

/**
 * Backs up instances to one storage. A run is a list of stages. What it changes on the host is journalled
 * before, and settled afterwards by the same code whether it succeeded, failed or died; see
 * docs/architecture.md.
 */
export class BackupPipeline {
  readonly #options: BackupPipelineOptions

  constructor(options: BackupPipelineOptions) {
    this.#options = options
  }

  /**
   * Takes one backup and resolves with its published manifest.
   *
   * @throws any {@link VarveError}. Where its `context.published` is the backup's id, the backup is good but
   * the host needs attention, such as after BLOCK_COMMIT_FAILED.
   */
  run(request: BackupRequest, run: RunOptions = {}): Promise<BackupManifest> {
    return this.#run(request, run).catch(error => {
      throw runError(error, run.signal)
    })
  }

  async #run(request: BackupRequest, run: RunOptions): Promise<BackupManifest> {
    const { host, stateDir } = this.#options
    if (!this.#options.storage) {
      throw new VarveError(
        'BACKUP_NOT_ENABLED',
        'Hypervisor backup not enabled: no backup storage is assigned to it. Assign one and enable it.',
      )
    }
    const storage = tellCommands(this.#options.storage, run.onEvent)
    checkRequest(request)
    const startedAt = new Date()

    stage(run, 'plan', `Looking at ${request.instance}`)
    if (storage.notice !== undefined) emit(run, { type: 'warning', message: storage.notice })
    const selection = request.disks ?? 'all'
    const known = await host.disks(request.instance, run)
    chooseDisks(known, selection) // refused before anything is held
    // All of them: a second run on other disks of the instance would find these on overlays, and its definition changed.
    await using lock = await DiskLock.acquire(known.disks.map(({ path }) => path))
    // The disks are held now: what is read from here on stays true.
    const instance = await host.instance(request.instance, run).catch(async error => {
      if (isVarveError(error, 'OVERLAY_LEFT_OVER'))
        await recordLateOverlays(known, { host, storage, stateDir, run })
      throw error
    })
    const disks = chooseDisks(instance, selection)
    lock.assertHolds(disks)
    assertClustersFit(disks, request.clusterSize ?? DEFAULT_CLUSTER_SIZE)
    await warnOfOddSizes(disks, run)
    await assertNoUnsettledRun(stateDir, instance, disks)
    await host.assertBacking(instance, disks.filter(isFileDisk), run)
    const catalog = await readCatalog(storage, `${instanceFolder(instance.name)}/`, run.signal)
    for (const { key, error } of catalog.damaged)
      emit(run, { type: 'warning', message: `${key} is left out: ${error.message}` })
    const { backups } = catalog
    warnOfClock(backups.at(-1), startedAt, run)
    const plan = planBackup({
      type: request.type ?? 'auto',
      disks,
      catalog,
      maxIncrementalChain: request.maxIncrementalChain ?? DEFAULT_MAX_INCREMENTAL_CHAIN,
    })
    warnOfLargeStreams(plan, storage, run)
    for (const { disk, ...decided } of plan.disks) {
      if (decided.kind === 'full' && decided.fallback) {
        emit(run, {
          type: 'fallback',
          disk: disk.name,
          reason: decided.fallback,
          message: fallbackMessage(disk.name, decided.fallback),
        })
      }
    }

    const ledger = new MarkLedger(stateDir, instance.name)
    const marked = await ledger.backupsOn(storage)
    const gone = goneBackups(marked, catalog)
    for (const disk of disks) {
      for (const mark of marksOfBackups(disk, gone)) {
        const message = `The backup of ${mark} is no longer on ${storage.location}: the mark is removed from ${disk.name} once this backup is complete.`
        emit(run, { type: 'warning', message })
      }
    }

    const id = newBackupId(backups.at(-1)?.manifest.id, startedAt)
    const overlays = await planOverlays(host, instance, disks, id)
    await lock.add([runLock(id)])
    const journal = await RunJournal.begin(stateDir, {
      version: 1,
      id,
      kind: 'backup',
      instance: instance.name,
      ...(instance.uuid !== undefined && { uuid: instance.uuid }),
      host: host.reference,
      storage: { type: storage.type, location: storage.location },
      disks: disks.map(({ name, path }) => ({ name, path })),
      startedAt: startedAt.toISOString(),
    })
    const folder = backupFolder(instance.name, plan.parent?.manifest.chain ?? id, id)
    const backup: BackupContext = {
      id,
      folder,
      host,
      storage,
      instance,
      request,
      plan,
      overlays,
      journal,
      lock,
      run,
      startedAt,
    }
    let manifest: BackupManifest | undefined
    let failure: VarveError | undefined
    const calls = new StorageCalls(storage)
    try {
      await ledger.add(id, storage)
      const definition = await storeDefinition(backup)
      await mark(backup)
      const frozen = await freeze(backup)
      // While the guest's overlays have room.
      await using watch = new OverlayWatch(frozen.overlays, request.overlayReserve, run)
      const snapshots = request.rbdSnapshots ?? DEFAULT_RBD_SNAPSHOTS
      await watch.during(run.signal, async signal => {
        const watched = { ...backup, storage: calls.storage, run: { ...run, signal } }
        await recordBases(watched, frozen)
        const images = await stream(watched, frozen)
        manifest = await describe(watched, frozen, { definition, disks: images })
        await publish(watched, manifest, {
          bitmaps: bitmapsToRetire(disks, backups, id, gone),
          snapshots: snapshotsToRetire(disks, backups, id, snapshots, gone),
        })
      })
    } catch (error) {
      failure = runError(error, run.signal)
    }
    const { onEvent } = run // no signal: what is begun is undone also after an abort
    let isGood = failure === undefined
    const { published } = await settleBackup(journal, {
      host,
      storage,
      storageEnds: () => calls.ended(),
      overlayReserve: request.overlayReserve,
      clusters: new Map(disks.flatMap(disk => (isFileDisk(disk) ? [] : [[disk.name, disk.cluster]]))),
      onPublished: () => {
        isGood = true // also where the upload of its manifest was answered with an error
      },
      run: onEvent ? { onEvent } : {},
    }).catch(error => {
      throw settleError(error, failure, isGood ? id : undefined)
    })
    if (published) {
      await forgetUnused(ledger, marked, instance, backups).catch(error => {
        throw settleError(error, failure, id)
      })
    }
    // A manifest that is there is a backup, also where its upload was answered with an error.
    if (manifest && published) return manifest
    throw failure
  }
}

/** Ids stay in order whatever the clocks are; but retention goes by the time at which a backup began. */
function warnOfClock(newest: StoredBackup | undefined, startedAt: Date, run: RunOptions): void {
  if (!newest) return
  const { id } = newest.manifest
  if (backupTime(id).getTime() - startedAt.getTime() < CLOCK_TOLERANCE_MS) return
  const message = `The newest backup has the id ${id}, of a time that is yet to come: a clock was ahead when it, or one before it, was taken, or this machine's is behind (${startedAt.toISOString()}). New ids go on from there. See that the clocks are right: by them prune tells one day from another.`
  emit(run, { type: 'warning', message })
}

/** Nobody knows the size of an RBD image's stream before its end, but that it is hardly more than the image's. */
function warnOfLargeStreams({ disks }: BackupPlan, storage: StorageDriver, run: RunOptions): void {
  const { maxStreamSize = Number.POSITIVE_INFINITY } = storage.capabilities
  for (const { disk, kind } of disks) {
    if (isFileDisk(disk) || kind !== 'full' || disk.virtualSize <= maxStreamSize) continue
    emit(run, {
      type: 'warning',
      message: `The image ${disk.image} of ${disk.name} may have ${disk.virtualSize} bytes of data, and ${storage.location} takes no more than ${maxStreamSize} of an RBD image: where it has more, the backup fails once they are used up. Let the storage take more (partSize of S3), or use another one.`,
    })
  }
}

/** QEMU counts a disk in sectors: it adds zeros to a raw file that ends within one. */
async function warnOfOddSizes(disks: readonly HostDisk[], run: RunOptions): Promise<void> {
  for (const { name, path, format } of disks.filter(isFileDisk)) {
    if (format !== 'raw') continue
    const { size = 0 } = (await statIfThere(path)) ?? {}
    const rest = size % SECTOR_SIZE
    if (rest === 0) continue
    emit(run, {
      type: 'warning',
      message: `The raw disk ${name} (${path}) has ${size} bytes, which is no multiple of ${SECTOR_SIZE}: it is backed up, and will be restored, with ${SECTOR_SIZE - rest} zero bytes more. To have the file back as it is, cut the restored one (truncate --size=${size}).`,
    })
  }
}

/** Forgets backups whose mark was on no disk. Those that are newer than what is published may be under way. */
async function forgetUnused(
  ledger: MarkLedger,
  marked: readonly string[],
  { disks }: Instance,
  backups: readonly StoredBackup[],
): Promise<void> {
  const newest = backups.at(-1)?.manifest.id ?? ''
  for (const id of marked) {
    const isUsed = disks.some(disk => marksOfBackups(disk, new Set([id])).length > 0)
    if (!isUsed && id < newest) await ledger.remove(id)
  }
}

function checkRequest(request: BackupRequest): void {
  const numbers = [
    ['maxIncrementalChain', 0],
    ['overlayReserve', 0],
    ['bandwidth', 1],
    ['concurrency', 1],
    ['rbdSnapshots', 1],
  ] as const
  for (const [name, least] of numbers) {
    const value = request[name]
    if (value !== undefined && (!Number.isSafeInteger(value) || value < least)) {
      throw new VarveError(
        'INVALID_ARGUMENT',
        `${name} is ${value}; it needs a whole number of at least ${least}.`,
        { context: { [name]: value } },
      )
    }
  }
  const choices = {
    type: ['auto', 'full', 'incremental'],
    freeze: ['off', 'try', 'require'],
    verifyUpload: ['size', 'digest'],
  } as const
  for (const name of ['type', 'freeze', 'verifyUpload'] as const) {
    const value: string | undefined = request[name]
    if (value !== undefined && !choices[name].some(choice => choice === value)) {
      throw new VarveError(
        'INVALID_ARGUMENT',
        `${name} is ${JSON.stringify(value)}; it needs one of ${choices[name].join(', ')}.`,
        { context: { [name]: value } },
      )
    }
  }
  const { clusterSize = DEFAULT_CLUSTER_SIZE } = request
  if (!Number.isInteger(Math.log2(clusterSize)) || clusterSize < 4096 || clusterSize > 2 * 1024 * 1024) {
    throw new VarveError(
      'INVALID_ARGUMENT',
      `clusterSize is ${clusterSize}; it needs a power of two from 4096 to 2097152.`,
      { context: { clusterSize } },
    )
  }
}
