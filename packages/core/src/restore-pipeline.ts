import { newBackupId } from './backup-id.ts'
import { findBackup, readCatalog, type StoredBackup } from './backups.ts'
import { DiskLock, runLock } from './disk-lock.ts'
import { type ErrorContext, errorMessage, isVarveError, runError, VarveError } from './errors.ts'
import type { DiskPlace, Host } from './host.ts'
import { RunJournal } from './journal.ts'
import { recordLateOverlays } from './late-overlays.ts'
import { MarkLedger } from './mark-ledger.ts'
import { rbdImageOf } from './rbd.ts'
import { chainForRestore } from './restore-chain.ts'
import { type RestoreContext, stage } from './restore-context.ts'
import { planRestore, type RestorePlan } from './restore-plan.ts'
import { define, finish, mark, powerOff } from './restore-stages.ts'
import { emit, type RunOptions } from './run-options.ts'
import { settleError } from './settle-backup.ts'
import { settleRestore } from './settle-restore.ts'
import type { StorageDriver } from './storage.ts'
import { instanceFolder } from './storage-layout.ts'
import { tellCommands } from './tell-commands.ts'
import { assertNoUnsettledRun } from './unsettled.ts'
import { writeTargets } from './write-targets.ts'

/** What a {@link RestorePipeline} works with. */
export interface RestorePipelineOptions {
  /** Where the instance lives. A restore to files does not use it. */
  host: Host
  /** Where the backup is. */
  storage: StorageDriver
  /** A folder on this machine's own disk for the journals of runs, such as `/var/lib/varve`. */
  stateDir: string
}

/** Where a backup is restored to. */
export type RestoreDestination =
  /** The disks of an instance that is defined; it is switched off for it. */
  | {
      /** The instance's name. */
      readonly instance: string
    }
  /**
   * New files, by disk name, or new RBD images: `rbd:<pool>/[<namespace>/]<image>`. Those that exist are refused
   * unless `overwrite` is set. Format: `qcow2` unless stated; an RBD image is always raw. In place they exist, and the
   * format is theirs: what they look like unless stated, as it must be for a block device, or an image that names other
   * files, which looks like qcow2: a guest can make its raw disk look so.
   */
  | {
      /** The target of each disk, by its name. */
      readonly disks: Readonly<Record<string, string>>
      /** The format of the files. */
      readonly format?: 'qcow2' | 'raw'
      /** Whether what exists is replaced. Default: false. */
      readonly overwrite?: boolean
    }
  /**
   * A new instance from the stored definition, its disks `<directory>/<name>-<disk>.<format>`. With `rbdPool`, a pool or
   * `<pool>/<namespace>`, disks that were RBD images become new ones, `<rbdPool>/<name>-<disk>`, in the cluster of the
   * original's disk, or where that is gone, of the host's own options.
   */
  | {
      /** The name of the new instance. */
      readonly newInstance: string
      /** The folder of its new disks. */
      readonly directory: string
      /** Their format. Default: `qcow2`. */
      readonly format?: 'qcow2' | 'raw'
      /** Where disks that were RBD images become new ones. Default: they become files. */
      readonly rbdPool?: string
    }

/** One restore. */
export interface RestoreRequest {
  /** The backup's id. */
  backup: string
  /** Where it is restored to. */
  to: RestoreDestination
  /** Which of the backup's disks. Default: all of them; with files as the target, those named there. */
  disks?: readonly string[]
  /**
   * Writes over the target instead of replacing it by a new file. Needed for block devices. A restore in
   * place that fails after its first write leaves the target incomplete: until it has been restored no backup takes it
   * (DISK_INCOMPLETE), and `recover` tells of it. Default: false.
   */
  inPlace?: boolean
  /**
   * Whether the instance is started afterwards. Default: if it ran before, or before a restore in place that was cut short and
   * that this one makes good; a new instance is not started.
   */
  start?: boolean
  /** How long the guest may take to shut down before it is switched off, in milliseconds. Default: 60,000. */
  powerOffTimeoutMs?: number
  /**
   * Whether an existing instance's definition and UEFI variables are put back too. Default: `keep`.
   */
  definition?: 'keep' | 'restore'
}

/** A disk that was restored. */
export interface RestoredDisk {
  /** Its name in the backup, such as `vda`. */
  readonly name: string
  /** Where it is now. */
  readonly path: string
  /** Its format there. */
  readonly format: 'qcow2' | 'raw' | 'rbd'
  /** Size of the guest's disk in bytes. */
  readonly virtualSize: number
  /** Bytes of data written. */
  readonly bytesWritten: number
}

/** The outcome of a restore. */
export interface RestoreResult {
  /** The backup's id. */
  readonly backup: string
  /** The disks that were restored. */
  readonly disks: readonly RestoredDisk[]
  /** The instance whose disks they are. */
  readonly instance?: string
  /** Whether it was started. */
  readonly started: boolean
}

/**
 * Puts backups back. A new image is written and checked beside the old one while the instance still runs;
 * only then is the instance switched off, the image swapped in by a rename and the instance started: a
 * restore that fails leaves everything as it was.
 */
export class RestorePipeline {
  readonly #options: RestorePipelineOptions

  constructor(options: RestorePipelineOptions) {
    this.#options = options
  }

  /** Restores one backup. @throws any {@link VarveError} */
  run(request: RestoreRequest, run: RunOptions = {}): Promise<RestoreResult> {
    return this.#run(request, run).catch(error => {
      throw runError(error, run.signal)
    })
  }

  async #run(request: RestoreRequest, run: RunOptions): Promise<RestoreResult> {
    const { host, stateDir } = this.#options
    const storage = tellCommands(this.#options.storage, run.onEvent)
    const signal = run.signal ? { signal: run.signal } : {}
    stage(run, 'preflight', `Looking at backup ${request.backup}`)
    if (storage.notice !== undefined) emit(run, { type: 'warning', message: storage.notice })
    const found = await findBackup(storage, request.backup, signal)
    const catalog = await readCatalog(storage, `${instanceFolder(found.manifest.instance.name)}/`, run.signal)
    const runId = newBackupId()
    // An instance is not looked into before: one that is being backed up has its disks on overlays, as after a backup that died.
    const known = 'instance' in request.to ? await host.disks(request.to.instance, run) : undefined
    const paths = known
      ? known.disks.map(({ path }) => path)
      : await pathsOfTargets(request, found, host, runId, run)
    await using lock = await DiskLock.acquire([...paths, runLock(runId)])
    // The disks are held now: what is read from here on stays true.
    const plan = await planRestore(request, found, host, runId, run).catch(async error => {
      if (known && isVarveError(error, 'OVERLAY_LEFT_OVER'))
        await recordLateOverlays(known, { host, storage, stateDir, run })
      throw error
    })
    lock.assertHolds(disksOf(plan))
    warnOfOtherInstance(plan, found, run)
    const chain = chainForRestore(found, catalog, {
      disks: plan.disks.map(({ disk }) => disk.name),
      definition: plan.newInstance !== undefined || request.definition === 'restore',
    })
    // A disk that was left incomplete is restored by itself too, but the instance is not to be started on it.
    const mayBeIncomplete = request.start ? targetsOf(plan) : disksOf(plan)
    await assertNoUnsettledRun(stateDir, plan.instance, disksOf(plan), mayBeIncomplete)
    const instance = plan.instance?.name ?? plan.newInstance?.name
    const journal = await RunJournal.begin(stateDir, {
      version: 1,
      id: runId,
      kind: 'restore',
      instance: instance ?? found.manifest.instance.name,
      host: host.reference,
      storage: { type: storage.type, location: storage.location },
      disks: targetsOf(plan),
      startedAt: new Date().toISOString(),
    })
    const restore: RestoreContext = { backup: found, chain, host, storage, request, plan, journal, run }
    let disks: RestoredDisk[] = []
    let failure: VarveError | undefined
    try {
      const nvram = await define(restore)
      if (request.inPlace) await powerOff(restore)
      disks = await writeTargets(restore)
      await rememberMark(new MarkLedger(stateDir, found.manifest.instance.name), found, plan, storage)
      await mark(restore, catalog.backups)
      if (!request.inPlace) await powerOff(restore)
      await finish(restore, nvram)
    } catch (error) {
      failure = runError(error, run.signal)
    }
    const { onEvent } = run
    const { finished, started, incomplete, refusal, notStarted } = await settleRestore(
      journal,
      host,
      onEvent ? { onEvent } : {},
    ).catch(error => {
      throw settleError(error, failure, undefined)
    })
    if (incomplete.length > 0) throw incompleteError(failure, journal, incomplete)
    const isRestored = request.inPlace && finished
    const error = failure && isRestored ? restoredError(failure, plan) : (failure ?? refusal)
    if (notStarted) throw error ? alsoNotStarted(error, notStarted) : notStartedError(notStarted, plan)
    if (error) throw error
    return { backup: request.backup, disks, ...(instance !== undefined && { instance }), started }
  }
}

/** What a restore to targets of its own holds. They are looked into once they are held. */
async function pathsOfTargets(
  request: RestoreRequest,
  backup: StoredBackup,
  host: Host,
  runId: string,
  run: RunOptions,
): Promise<string[]> {
  const plan = await planRestore(request, backup, host, runId, run, { looksAtImages: false })
  return targetsOf(plan).map(({ path }) => path)
}

/** Where a restore writes to, by the names of the disks. */
function targetsOf({ disks }: RestorePlan) {
  return disks.map(({ disk, target }) => ({ name: disk.name, path: target }))
}

/** What a restore holds: all disks of the instance too, as a restore of others would start it in the middle of this one. */
function disksOf(plan: RestorePlan): readonly DiskPlace[] {
  return [...targetsOf(plan), ...(plan.instance?.disks ?? [])]
}

/** A name may be given again: to another customer's machine, say. */
function warnOfOtherInstance({ instance }: RestorePlan, { manifest }: StoredBackup, run: RunOptions): void {
  const { name, uuid } = manifest.instance
  if (instance?.name !== name || !uuid || !instance.uuid || instance.uuid === uuid) return
  const message = `The backup ${manifest.id} is of another instance that had the name ${name}, or ${name} was defined anew since: its UUID was ${uuid} and is ${instance.uuid} by now. See that this is the backup that you want.`
  emit(run, { type: 'warning', message })
}

/**
 * Records to which storage the mark belongs that the instance's own disks get. Where a record is there it stays: the backup went
 * to that storage, the chain there goes on from the mark too, and this may be a copy of it on another one.
 */
async function rememberMark(
  ledger: MarkLedger,
  { manifest }: StoredBackup,
  plan: RestorePlan,
  storage: StorageDriver,
): Promise<void> {
  const own = plan.instance
    ? plan.instance.name === manifest.instance.name
    : !plan.newInstance &&
      plan.disks.some(({ disk, target }) => (rbdImageOf(target) ?? target) === disk.source.path)
  if (own && !(await ledger.storageOf(manifest.id))) await ledger.add(manifest.id, storage)
}

function incompleteError(failure: unknown, journal: RunJournal, disks: readonly string[]): VarveError {
  const names = disks.join(', ')
  const what =
    journal.of('written-in-place').length > 0
      ? `The disk ${names} was restored in place, but not all that was to be restored with it`
      : `The restore in place was cut short: the disk ${names} holds neither the old nor the restored content`
  const message = `${errorMessage(failure)} ${what}. Restore again before the instance is started.`
  return withContext(failure, message, { incomplete: disks })
}

/** What came after a restore in place went wrong. */
function restoredError(failure: unknown, { disks }: RestorePlan): VarveError {
  const names = disks.map(({ disk }) => disk.name)
  const message = `The disk ${names.join(', ')} is restored in place, and whole. What failed came after that, so the next backup may be a full one: ${errorMessage(failure)}`
  return withContext(failure, message, { restored: names })
}

/** The restore is done, and its instance does not start. */
function notStartedError(notStarted: VarveError, { disks }: RestorePlan): VarveError {
  const names = disks.map(({ disk }) => disk.name)
  const message = `The disk ${names.join(', ')} is restored, and whole, so there is no need to restore again; but ${notStarted.message}`
  return withContext(notStarted, message, { restored: names })
}

/** The instance is off, which a restore that is made again would take for how it is to be: that is not to be retried. */
function alsoNotStarted(error: VarveError, notStarted: VarveError): VarveError {
  const { code, message, context } = error
  return new VarveError(code, `${message} And ${notStarted.message}`, {
    context: { ...notStarted.context, ...context },
    cause: new AggregateError([error, notStarted]),
  })
}

function withContext(failure: unknown, message: string, context: ErrorContext): VarveError {
  const known = isVarveError(failure) ? failure : undefined
  return new VarveError(known?.code ?? 'ABORTED', message, {
    context: { ...known?.context, ...context },
    cause: failure,
  })
}
