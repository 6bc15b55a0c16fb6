import { stat } from 'node:fs/promises'
import {
  errorMessage,
  findOrphans,
  type RbdOrphan,
  type RecoveredRun,
  type RecoverReport,
  recover,
  type StorageDriver,
  VarveError,
} from '@varve/core'
import type { Command } from 'commander'
import { openStorage } from '../config.ts'
import { errorDocument, errorText } from '../error-text.ts'
import { quote } from '../event-text.ts'
import { EXIT, worst } from '../exit-code.ts'
import { libvirtUriOption, stateDirOption } from '../options.ts'
import type { Session } from '../session.ts'
import { renderTable } from '../table.ts'

const OUTCOMES: Record<RecoveredRun['outcome'], string> = {
  finished: 'finished: it was far enough to be carried through',
  undone: 'undone: everything is as before it',
  incomplete: 'INCOMPLETE: it wrote in place; restore the disk again',
  running: 'still running, so left alone',
  unresolved: 'UNRESOLVED',
}

interface RecoverOptions {
  orphans?: boolean
  stateDir?: string
  libvirtUri?: string
}

/** `varve recover` */
export function recoverCommand(program: Command, session: Session): void {
  program
    .command('recover')
    .summary('clean up after runs that were cut short')
    .description(
      'Settles every backup and restore of this machine that was killed or cut short: merges overlays back, ends servers, removes unfinished files. Can be repeated; a run that goes on is left alone.',
    )
    .option('--orphans', 'also list snapshots and RBD images of Varve that no run and no backup knows')
    .addOption(stateDirOption())
    .addOption(libvirtUriOption())
    .addHelpText('after', '\nExample:\n  varve recover')
    .action((options: RecoverOptions) => recoverRuns(session, options))
}

async function recoverRuns(session: Session, options: RecoverOptions): Promise<void> {
  const config = await session.config()
  const stateDir = await session.stateDir(options.stateDir)
  const storages: StorageDriver[] = []
  try {
    for (const name of config.storages.keys()) {
      try {
        storages.push(await openStorage(config, name, session.terminal.env))
      } catch (error) {
        if (options.orphans) throw orphansRefused(name, error)
        // It must not keep instances off their disks: only its own runs stay unresolved.
        session.notice(`The storage ${name} is left out: ${errorMessage(error)}`)
      }
    }
    const host = await session.libvirtHost(options.libvirtUri)
    const report = await recover({ stateDir, storages, rbd: await session.rbd() }, session.run())
    if (report.runs.length === 0 && (await isMissing(stateDir))) {
      session.notice(
        `The state folder ${stateDir} is not there, so no run is known. If they had another one, name it with --state-dir.`,
      )
    }
    if (report.runs.some(needsAttention)) session.exitCode = EXIT.attention
    const [document, text] = [recoverDocument(report), recoverText(report)]
    if (!options.orphans) return await session.result(document, text)
    const search = await findOrphans({ host, storages, stateDir }, session.run()).then(
      orphans => ({ orphans }),
      (error: unknown) => ({ error }),
    )
    if ('orphans' in search)
      return await session.result({ ...document, ...search }, `${text}\n\n${orphansText(search.orphans)}`)
    // What was recovered is told nevertheless.
    session.exitCode = worst(session.exitCode, EXIT.failed)
    await session.result({ ...document, ...errorDocument(search.error) }, text)
    session.notice(`Error: ${errorText(search.error, session)}`)
  } finally {
    for (const storage of storages) await storage[Symbol.asyncDispose]()
  }
}

function orphansRefused(storage: string, cause: unknown): VarveError {
  return new VarveError(
    'INVALID_CONFIG',
    `What belongs to no backup cannot be told without every storage of the configuration, and ${storage} cannot be opened: ${errorMessage(cause)} Nothing was done; "varve recover" without --orphans does without the storage.`,
    { context: { storage }, cause },
  )
}

async function isMissing(path: string): Promise<boolean> {
  return stat(path).then(
    () => false,
    () => true, // what else is wrong with it, recover has told
  )
}

/** Whether someone has to look at what became of a run. */
function needsAttention({ outcome, error }: RecoveredRun): boolean {
  return error !== undefined || outcome === 'incomplete'
}

function recoverDocument({ runs, ok }: RecoverReport): object {
  return {
    ok,
    runs: runs.map(({ error, ...run }) => ({
      ...run,
      ...(error && { error: { code: error.code, message: error.message, context: error.context } }),
    })),
  }
}

/** What `varve recover --orphans` found, with the commands that remove it. */
export function orphansText(orphans: readonly RbdOrphan[]): string {
  if (orphans.length === 0) return 'No snapshot or RBD image of Varve is without a run or a backup.'
  const commands = orphans.map(({ image, snapshot }) =>
    snapshot === undefined
      ? `rbd snap purge ${quote(image)} && rbd rm ${quote(image)}`
      : `rbd snap rm ${quote(`${image}@${snapshot}`)}`,
  )
  return [
    'These belong to no run of this machine and to no backup on its storages. Unless another machine or storage has them, remove them:',
    ...commands.map(command => `  ${command}`),
  ].join('\n')
}

/** What `varve recover` did. */
export function recoverText({ runs }: RecoverReport): string {
  if (runs.length === 0) return 'Nothing to recover: no run was cut short.'
  return renderTable(
    [{ title: 'RUN' }, { title: 'KIND' }, { title: 'INSTANCE' }, { title: 'OUTCOME' }],
    runs.map(({ id, kind, instance, outcome, error }) => [
      id,
      kind ?? '?',
      instance ?? '?',
      error ? `${OUTCOMES[outcome]}: ${error.message}` : OUTCOMES[outcome],
    ]),
  )
}
