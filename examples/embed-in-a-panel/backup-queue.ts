import {
  type BackupManifest,
  BackupPipeline,
  type Host,
  isVarveError,
  type RbdConnector,
  type RecoverReport,
  type RunOptions,
  recover,
  type StorageDriver,
  tell,
} from '@varve/core'
import PQueue from 'p-queue'
import { type JobView, newJobView, reduceError, reduceEvent } from './job-view.ts'

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
  /** Called whenever a job has changed: push it to the browser. What it throws, or rejects with, breaks no backup. */
  readonly onChange?: (id: number, view: JobView) => void
}

/** A backup in the queue. */
export interface QueuedBackup {
  readonly id: number
  /** The manifest; undefined where the run failed or was cancelled, which its view tells. Never rejects. */
  readonly result: Promise<BackupManifest | undefined>
}

/** The backup queue of a panel: a few at a time, each with a view fed by its events, each can be cancelled. */
export class BackupQueue {
  readonly #options: BackupQueueOptions
  readonly #queue: PQueue
  readonly #views = new Map<number, JobView>()
  readonly #cancels = new Map<number, AbortController>()
  #lastId = 0

  constructor(options: BackupQueueOptions) {
    this.#options = options
    this.#queue = new PQueue({ concurrency: options.concurrency })
  }

  /**
   * Settles the runs that were going on when the panel ended, so call it when it starts; and every few minutes from then on, for
   * what could not be settled yet. It leaves running backups alone.
   */
  recover(): Promise<RecoverReport> {
    const { stateDir, storage, rbd } = this.#options
    return recover({ stateDir, storages: [storage], ...(rbd && { rbd }) })
  }

  add(instance: string): QueuedBackup {
    const id = ++this.#lastId
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

  /** Drops the view of a job that has ended. */
  forget(id: number): void {
    if (!this.#cancels.has(id)) this.#views.delete(id)
  }

  async #run(id: number, instance: string): Promise<BackupManifest | undefined> {
    const { signal } = this.#cancels.get(id) ?? new AbortController()
    try {
      if (!signal.aborted) this.#change(id, view => ({ ...view, state: 'running' }))
      const manifest = await this.#backUp(instance, {
        signal, // cancelled perhaps while it waited
        onEvent: event => this.#change(id, view => reduceEvent(view, event)),
      })
      this.#change(id, view => ({ ...view, state: 'done', backup: manifest.id }))
      return manifest
    } catch (error) {
      this.#change(id, view => reduceError(view, error))
      return undefined
    } finally {
      this.#cancels.delete(id)
    }
  }

  async #backUp(instance: string, run: RunOptions): Promise<BackupManifest> {
    const { storage, stateDir, hostOf } = this.#options
    const pipeline = new BackupPipeline({ host: hostOf(instance), storage, stateDir })
    try {
      return await pipeline.run({ instance }, run)
    } catch (error) {
      // A former run of the instance is in the way, which may have died, or failed, while this panel went on.
      const isFormer = isVarveError(error, 'RUN_UNRESOLVED') || isVarveError(error, 'OVERLAY_LEFT_OVER')
      if (!isFormer || error.context.published !== undefined) throw error
      await this.recover()
      return pipeline.run({ instance }, run)
    }
  }

  #change(id: number, change: (view: JobView) => JobView): void {
    const view = this.#views.get(id)
    if (view) this.#show(id, change(view))
  }

  #show(id: number, view: JobView): void {
    this.#views.set(id, view)
    tell(view => this.#options.onChange?.(id, view), view)
  }
}
