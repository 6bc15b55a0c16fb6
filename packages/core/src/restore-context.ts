import type { StoredBackup } from './backups.ts'
import { abortError } from './errors.ts'
import type { RestoreStage } from './events.ts'
import type { Host } from './host.ts'
import type { RunJournal } from './journal.ts'
import { folderIdentity } from './presence.ts'
import type { RestoreRequest } from './restore-pipeline.ts'
import type { RestorePlan } from './restore-plan.ts'
import { targetError } from './restore-target.ts'
import { emit, type RunOptions } from './run-options.ts'
import type { StorageDriver } from './storage.ts'

/** What the stages of one restore share. */
export interface RestoreContext {
  readonly backup: StoredBackup
  /** The full backup first, the one to restore last. */
  readonly chain: readonly StoredBackup[]
  readonly host: Host
  readonly storage: StorageDriver
  readonly request: RestoreRequest
  readonly plan: RestorePlan
  readonly journal: RunJournal
  readonly run: RunOptions
}

/** Records a file that is about to be made. @throws what would keep it from being made */
export async function recordTarget(journal: RunJournal, temporary: string): Promise<void> {
  const folder = await folderIdentity(temporary).catch(error => {
    throw targetError(error, temporary)
  })
  await journal.record({ step: 'target-create', temporary, folder })
}

/** Tells that a stage begins, unless the run was given up. */
export function stage(run: RunOptions, name: RestoreStage, message: string): void {
  if (run.signal?.aborted) throw abortError(run.signal)
  emit(run, { type: 'stage', stage: name, message })
}
