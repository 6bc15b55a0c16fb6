import { DiskLock, runLock } from './disk-lock.ts'
import { abortError, errorMessage, isVarveError, VarveError } from './errors.ts'
import type { Host, HostReference } from './host.ts'
import { ImageHost } from './image-host.ts'
import { incompleteDisks } from './incomplete.ts'
import { type JournalHeader, RunJournal } from './journal.ts'
import { LibvirtHost } from './libvirt-host.ts'
import type { RbdConnector } from './rbd.ts'
import type { RunOptions } from './run-options.ts'
import { isSameStorage } from './same-storage.ts'
import { settleBackup } from './settle-backup.ts'
import { settleRestore } from './settle-restore.ts'
import type { StorageDriver } from './storage.ts'
import { tellCommands } from './tell-commands.ts'

/** What {@link recover} works with. */
export interface RecoverOptions {
  /** The state folder of the pipelines. */
  stateDir: string
  /** The storages at hand; a backup that was cut short is settled with the one that it used. */
  storages: readonly StorageDriver[]
  /** The host of all the runs. Default: the one that each run recorded. */
  host?: Host
  /** What reaches the RBD images of those hosts: `new CephConnector()` of `@varve/ceph`. */
  rbd?: RbdConnector
}

/** A run that was cut short, and what became of it. */
export interface RecoveredRun {
  /** The run's id: that of the backup, or one of the restore's own. */
  readonly id: string
  /** Absent, as the instance is, where the run's journal cannot be read: see `error`. */
  readonly kind?: 'backup' | 'restore'
  /** The instance whose disks it had. */
  readonly instance?: string
  /**
   * `finished`: it had reached the point from which it is carried through. `undone`: everything is as
   * before it. `incomplete`: a restore in place was cut short; the disk must be restored again, and until then
   * each call tells of it.
   * `running`: its process lives. `unresolved`: see `error`.
   */
  readonly outcome: 'finished' | 'undone' | 'incomplete' | 'running' | 'unresolved'
  /** Why it is unresolved; or why the instance of a restore that is settled was not started, which is told once. */
  readonly error?: VarveError
}

/** The outcome of {@link recover}. */
export interface RecoverReport {
  /** Each run that was found cut short, or is running. */
  readonly runs: readonly RecoveredRun[]
  /** Whether nothing is left to look at. */
  readonly ok: boolean
}

/**
 * Settles every run that was cut short: overlays are merged back, servers ended, bitmaps and files of
 * unfinished runs removed. May itself be cut short and called again; runs whose process lives are left
 * alone. After an abort the run that is being settled is still settled, and none after it is begun.
 *
 * @throws ABORTED
 */
export async function recover(options: RecoverOptions, run: RunOptions = {}): Promise<RecoverReport> {
  const { signal, ...settling } = run
  const runs: RecoveredRun[] = []
  for (const id of await RunJournal.unsettled(options.stateDir)) {
    if (signal?.aborted) throw abortError(signal)
    const recovered = await recoverRun(id, options, settling)
    if (recovered) runs.push(recovered)
  }
  return { runs, ok: runs.every(isDone) }
}

function isDone({ outcome, error }: RecoveredRun): boolean {
  return error === undefined && (outcome === 'finished' || outcome === 'undone')
}

/**
 * Undefined where there is nothing to tell: the run has settled itself, or had not begun, or the disk that it left
 * incomplete is gone.
 */
async function recoverRun(
  id: string,
  options: RecoverOptions,
  run: Omit<RunOptions, 'signal'>,
): Promise<RecoveredRun | undefined> {
  const { stateDir } = options
  let about: Pick<RecoveredRun, 'id' | 'kind' | 'instance'> = { id }
  try {
    const found = await RunJournal.read(stateDir, id)
    if (!found) {
      await RunJournal.removeBegun(stateDir, id)
      return undefined
    }
    const { kind, instance, disks } = found.header
    about = { id, kind, instance }
    await using own = await unlessBusy([runLock(id)])
    if (!own) return { ...about, outcome: 'running' }
    await using lock = await unlessBusy(disks.map(({ path }) => path))
    // Until its disks were held the run may have gone on: what it did meanwhile counts, and it may be settled.
    const journal = await RunJournal.read(stateDir, id)
    if (journal && !lock) throw heldByAnother(journal.header)
    const settled = journal && (await settle(journal, options, run))
    return settled && { ...about, ...settled }
  } catch (error) {
    const reason = isVarveError(error)
      ? error
      : new VarveError('RUN_UNRESOLVED', errorMessage(error), { cause: error })
    return { ...about, outcome: 'unresolved', error: reason }
  }
}

async function settle(
  journal: RunJournal,
  options: RecoverOptions,
  run: Omit<RunOptions, 'signal'>,
): Promise<Pick<RecoveredRun, 'outcome' | 'error'> | undefined> {
  const { header } = journal
  const host = options.host ?? hostOf(header.host, options.rbd)
  if (header.kind === 'restore') {
    const known = incompleteDisks(journal)
    const { finished, incomplete, notStarted } = await settleRestore(journal, host, run, { died: true })
    if (known && incomplete.length === 0) return undefined
    const outcome = incomplete.length > 0 ? 'incomplete' : finished ? 'finished' : 'undone'
    return { outcome, ...(notStarted && { error: notStarted }) }
  }
  const used = options.storages.find(storage => isSameStorage(storage, header.storage))
  const storage = used && tellCommands(used, run.onEvent)
  const { published } = await settleBackup(journal, { host, storage, died: true, run })
  return { outcome: published ? 'finished' : 'undone' }
}

/** None where another process holds one of them. */
async function unlessBusy(names: readonly string[]): Promise<DiskLock | undefined> {
  return DiskLock.acquire(names).catch(error => {
    if (isVarveError(error, 'DISK_BUSY')) return undefined
    throw error
  })
}

/**
 * It is dead, but somebody is at its disks, such as a backup that is about to be refused for it. Or it is a run of a former
 * version, which holds its disks alone.
 */
function heldByAnother({ kind, instance, disks }: JournalHeader): VarveError {
  const names = disks.map(({ name }) => name)
  return new VarveError(
    'DISK_BUSY',
    `The ${kind} of ${instance} has ended before it was done, and another run holds one of its disks, ${names.join(', ')}; or it goes on in a process that was started before Varve was updated, which is to be left alone. Call recover again once that has ended.`,
    { context: { instance, disks: names }, retryable: true },
  )
}

function hostOf(reference: HostReference, rbd: RbdConnector | undefined): Host {
  const connector = rbd ? { rbd } : {}
  return reference.kind === 'libvirt'
    ? new LibvirtHost({ uri: reference.uri, ...connector })
    : new ImageHost({ ...reference, ...connector })
}
