import type { BackupRequest } from './backup-pipeline.ts'
import type { BackupPlan } from './backup-plan.ts'
import type { DiskLock } from './disk-lock.ts'
import { abortError } from './errors.ts'
import type { BackupStage } from './events.ts'
import type { Host, Instance } from './host.ts'
import type { RunJournal } from './journal.ts'
import type { SizedOverlay } from './overlay-space.ts'
import { emit, type RunOptions } from './run-options.ts'
import type { StorageDriver } from './storage.ts'

/** What the stages of one backup share. */
export interface BackupContext {
  readonly id: string
  /** Where it goes on the storage. */
  readonly folder: string
  readonly host: Host
  readonly storage: StorageDriver
  readonly instance: Instance
  readonly request: BackupRequest
  readonly plan: BackupPlan
  /** Where a running instance is to write to meanwhile. */
  readonly overlays: readonly SizedOverlay[]
  readonly journal: RunJournal
  /** Of all disks of the instance. */
  readonly lock: DiskLock
  readonly run: RunOptions
  readonly startedAt: Date
}

/** Tells that a stage begins, unless the run was given up. */
export function stage(run: RunOptions, name: BackupStage, message: string): void {
  if (run.signal?.aborted) throw abortError(run.signal)
  emit(run, { type: 'stage', stage: name, message })
}
