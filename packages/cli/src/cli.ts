import { isVarveError, VarveError } from '@varve/core'
import { Command, CommanderError } from 'commander'
import { backupCommand } from './commands/backup.ts'
import { deleteCommand } from './commands/delete.ts'
import { listCommand } from './commands/list.ts'
import { pruneCommand } from './commands/prune.ts'
import { recoverCommand } from './commands/recover.ts'
import { restoreCommand } from './commands/restore.ts'
import { showCommand } from './commands/show.ts'
import { storageCommand } from './commands/storage.ts'
import { verifyCommand } from './commands/verify.ts'
import { errorDocument, errorText } from './error-text.ts'
import { EXIT, type ExitCode, exitCodeOf, worst } from './exit-code.ts'
import { printable } from './printable.ts'
import { type GlobalOptions, Session } from './session.ts'
import type { EndSignal, Terminal } from './terminal.ts'
import { VERSION } from './version.ts'
import { writeText } from './write-text.ts'

const EXAMPLES = `
Examples:
  varve backup web-1                     back up a libvirt domain, full or what changed
  varve list web-1                       what there is to restore
  varve restore <backup> --to-instance web-1
  varve verify <backup> --deep

Exit codes: 0 done, 1 failed, 2 usage, 3 done but a host needs attention.`

const HELP = new Set(['commander.help', 'commander.helpDisplayed', 'commander.version'])

/** Runs one command line, and resolves with its exit code when everything is written and cleaned up. */
export async function runCli(args: readonly string[], terminal: Terminal): Promise<ExitCode> {
  const json = args.includes('--json') // a command line that is not understood has no session.json
  const given = new AbortController()
  const session = new Session(terminal, given.signal)
  terminal.onSignal(signal => {
    session.notice(
      given.signal.aborted
        ? 'Still cleaning up. What a killed varve leaves behind is put right by "varve recover".'
        : 'Stopping and cleaning up, please wait.',
    )
    given.abort(interrupted(signal))
  })
  let help = ''
  const writeOut = (text: string) => {
    help += text
  }
  try {
    await createProgram(session, writeOut).parseAsync(args, { from: 'user' })
    return session.exitCode
  } catch (error) {
    session.close()
    return await tellError(error, session, { json, help })
  } finally {
    session.close()
  }
}

/** Tells what ended a command line without a result, or shows the help that was asked for. */
async function tellError(
  error: unknown,
  session: Session,
  { json, help }: { json: boolean; help: string },
): Promise<ExitCode> {
  const { stdout, stderr } = session.terminal
  // Help and the version were asked for, or help was shown on standard error since there was no command.
  const isHelp = error instanceof CommanderError && HELP.has(error.code)
  const isAsked = isHelp && exitCodeOf(error) === EXIT.done
  const problems = isHelp ? [] : [error]
  try {
    if (json && !isVarveError(error, 'OUTPUT_FAILED')) {
      const asked = help === `${VERSION}\n` ? { version: VERSION } : { help }
      await writeText(stdout, JSON.stringify(isAsked ? asked : errorDocument(error), null, 2))
    } else if (isAsked) await writeText(stdout, help.trimEnd())
  } catch (unwritten) {
    problems.push(unwritten)
  }
  for (const problem of problems) {
    const text = `Error: ${printable(errorText(problem, session))}`
    await writeText(stderr, text).catch(() => undefined) // there is no other place to tell it
  }
  return worst(session.exitCode, exitCodeOf(error), ...problems.map(exitCodeOf))
}

function interrupted(signal: EndSignal): VarveError {
  const by = signal === 'SIGINT' ? 'Ctrl-C' : signal
  return new VarveError('ABORTED', `Stopped by ${by}.`)
}

function createProgram(session: Session, writeOut: (text: string) => void): Command {
  const { stderr } = session.terminal
  const program = new Command('varve')
  program
    .description('Backs up and restores KVM/QEMU instances: full and incremental images.')
    .version(VERSION, '-V, --version', 'print the version')
    .option(
      '-c, --config <file>',
      'configuration (VARVE_CONFIG, ./varve.config.json, /etc/varve/config.json)',
    )
    .option('--json', 'write one JSON document to standard output, everything else to standard error')
    .option('-v, --verbose', 'show external commands with their exit codes, and the causes of errors')
    .configureHelp({ showGlobalOptions: true })
    .configureOutput({
      writeOut,
      writeErr: text => void stderr.write(text),
      outputError: () => undefined, // told by runCli
    })
    .exitOverride()
    .addHelpText('after', EXAMPLES)
    .hook('preAction', (_program, command) => session.begin(command.optsWithGlobals<GlobalOptions>()))
  // Commands inherit these settings, so they come after them.
  backupCommand(program, session)
  restoreCommand(program, session)
  listCommand(program, session)
  showCommand(program, session)
  verifyCommand(program, session)
  deleteCommand(program, session)
  pruneCommand(program, session)
  recoverCommand(program, session)
  storageCommand(program, session)
  return program
}
