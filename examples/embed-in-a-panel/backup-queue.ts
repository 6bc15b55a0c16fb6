import {
  type BackupManifest,
  BackupPipeline,
  type Host,
  isVarveError,
  type RbdConnector,
  type RecoverReport,
  recover,
  type StorageDriver,
} from '@varve/core'
import PQueue from 'p-queue'
import { type JobView, newJobView, reduceEvent } from './job-view.ts'

/** What a {@link BackupQueue} works with. */
export interface BackupQueueOptions {
  readonly storage: StorageDriver
  readonly stateDir: string
  /** Where an instance lives. */
  readonly hostOf: (instance: string) => Host
  /** How `recover` reaches the cluster of disks on Ceph, such as a `CephConnector`; needed where there are any. */
  readonly rbd?: RbdConnector
  /** Backups at one time. */
  readonly concurrency: number
  /** Called whenever a job has changed: push it to the browser. */
  readonly onChange?: (id: number, view: JobView) => void
}

/** A backup in the queue. */
export interface QueuedBackup {
  readonly id: number
  /** The manifest; undefined where the backup failed or was cancelled, which its view tells. */
  readonly result: Promise<BackupManifest | undefined>
}

/** The backup queue of a panel: a few at a time, each with a view fed by its events, each can be cancelled. */
export class BackupQueue {
  readonly #options: BackupQueueOptions
  readonly #queue: PQueue
  readonly #views = new Map<number, JobView>()
  readonly #cancels = new Map<number, AbortController>()

  constructor(options: BackupQueueOptions) {
    this.#options = options
    this.#queue = new PQueue({ concurrency: options.concurrency })
  }

  /** Call it once when the panel starts: settles the runs that were going on when it ended. */
  recover(): Promise<RecoverReport> {
    const { stateDir, storage, rbd } = this.#options
    return recover({ stateDir, storages: [storage], ...(rbd && { rbd }) })
  }

  add(instance: string): QueuedBackup {
    const id = this.#views.size + 1
    this.#cancels.set(id, new AbortController())
    this.#show(id, newJobView(instance))
    return { id, result: this.#queue.add(() => this.#run(id, instance)) }
  }

  /** Stops a backup, or takes it off the queue. What it had begun is undone before its result is there. */
  cancel(id: number): void {
    this.#cancels.get(id)?.abort(new Error('cancelled in the panel'))
  }

  view(id: number): JobView | undefined {
    return this.#views.get(id)
  }

  async #run(id: number, instance: string): Promise<BackupManifest | undefined> {
    const { storage, stateDir, hostOf } = this.#options
    const { signal } = this.#cancels.get(id) ?? new AbortController()
    try {
      signal.throwIfAborted() // cancelled while it waited
      this.#change(id, view => ({ ...view, state: 'running' }))
      const pipeline = new BackupPipeline({ host: hostOf(instance), storage, stateDir })
      const manifest = await pipeline.run(
        { instance },
        { signal, onEvent: event => this.#change(id, view => reduceEvent(view, event)) },
      )
      this.#change(id, view => ({ ...view, state: 'done' }))
      return manifest
    } catch (error) {
      const state = signal.aborted ? 'cancelled' : 'failed'
      const note = isVarveError(error) ? `${error.code}: ${error.message}` : String(error)
      this.#change(id, view => ({ ...view, state, notes: [...view.notes, note] }))
      return undefined
    } finally {
      this.#cancels.delete(id)
    }
  }

  #change(id: number, change: (view: JobView) => JobView): void {
    const view = this.#views.get(id)
    if (view) this.#show(id, change(view))
  }

  #show(id: number, view: JobView): void {
    this.#views.set(id, view)
    this.#options.onChange?.(id, view)
  }
}
