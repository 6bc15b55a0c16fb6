import { execa } from 'execa'
import { abortError, VarveError, type VarveErrorOptions } from './errors.ts'
import { emit, type RunOptions } from './run-options.ts'

/** How much of a command's output is kept in events and errors, in characters. */
const OUTPUT_LIMIT = 16_384

/** How often a command is started that a Ctrl-C ends before it begins. */
const MOST_TRIES = 10

/** Where the programs come from, for the error of a missing one. */
const PACKAGES: Readonly<Record<string, string>> = {
  virsh: 'libvirt-clients',
  'qemu-img': 'qemu-utils',
  'qemu-io': 'qemu-utils',
  'qemu-nbd': 'qemu-utils',
  rbd: 'ceph-common',
}

/** Options of {@link runCommand}. */
export interface CommandOptions extends RunOptions {
  /** What is run, for messages. Default: the program and its first argument. */
  label?: string
  /** The command is ended after this many milliseconds. Default: 60,000. */
  timeoutMs?: number
  /** Variables of its environment beside those of this process, where secrets may be: they are in no event or error. */
  env?: Readonly<Record<string, string>>
  /** Whether standard output may hold a secret, and is left out of events and errors. Default: false. */
  secretOutput?: boolean
  /** Takes each line of standard output, of which nothing is kept then: for output without a limit. */
  onLine?: (line: string) => void
}

/** What a command that succeeded printed. */
export interface CommandResult {
  /** All that it printed. */
  readonly stdout: string
  /** All that it said of its work and its errors. */
  readonly stderr: string
}

/**
 * Runs an external program and tells of it in a `command` event.
 *
 * @throws COMMAND_MISSING, COMMAND_TIMEOUT, COMMAND_FAILED with its exit code and what it printed, ABORTED.
 */
export async function runCommand(
  command: string,
  args: readonly string[],
  options: CommandOptions = {},
): Promise<CommandResult> {
  const {
    signal,
    timeoutMs = 60_000,
    env,
    label = `${command} ${args[0] ?? ''}`,
    secretOutput = false,
    onLine,
  } = options
  if (signal?.aborted) throw abortError(signal)
  const run = () =>
    execa(command, args, {
      stdin: 'ignore',
      env: { LC_ALL: 'C', ...env }, // messages are looked at
      reject: false,
      detached: true, // a Ctrl-C in the terminal is for Varve, and must not end what cleans up
      timeout: timeoutMs,
      forceKillAfterDelay: 5_000,
      maxBuffer: 64 * 1024 * 1024,
      stripFinalNewline: true,
      ...(onLine && {
        // biome-ignore lint/correctness/useYield: no line is handed on
        stdout: function* (line: string) {
          onLine(line)
        },
      }),
      ...(signal && { cancelSignal: signal }),
    })
  let result = await run()
  // Until it has a session of its own, a new process gets the Ctrl-C all the same. It has done nothing by then.
  for (let tries = 1; result.signal === 'SIGINT' && !signal?.aborted && tries < MOST_TRIES; tries++) {
    result = await run()
  }
  const stdout = secretOutput ? '' : shown(result.stdout)
  const stderr = shown(result.stderr)
  emit(options, {
    type: 'command',
    command,
    args,
    exitCode: result.exitCode,
    stdout,
    stderr,
    durationMs: Math.round(result.durationMs),
  })
  if (!result.failed) return { stdout: result.stdout, stderr: result.stderr }
  if (signal?.aborted && (result.isCanceled || result.signal === 'SIGINT')) throw abortError(signal)

  const { exitCode, signal: endedBy } = result
  const context = { command, args, exitCode, endedBy, stderr }
  // execa's result has the environment and all of the output in it.
  const keepsSecret = secretOutput || env !== undefined || HEADER_KEY.test(result.stdout + result.stderr)
  const cause = keepsSecret ? undefined : result
  if (result.code === 'ENOENT') throw missingCommand(command, { context, cause })
  if (result.timedOut) {
    throw new VarveError(
      'COMMAND_TIMEOUT',
      `${label} did not end within ${timeoutMs / 1000} s and was stopped. See that libvirt and the file system of the disks answer, and try again.`,
      { context, cause, retryable: true },
    )
  }
  const said = lastLine(stderr) || lastLine(stdout) || result.shortMessage
  throw new VarveError(
    'COMMAND_FAILED',
    `${label} failed (exit ${result.exitCode ?? result.signal ?? '?'}): ${said}; put that right and try again`, // it is often a part of a sentence
    { context, cause },
  )
}

/** The error of a program that is not there. */
export function missingCommand(command: string, options: VarveErrorOptions): VarveError {
  const from = PACKAGES[command]
  return new VarveError(
    'COMMAND_MISSING',
    `The program ${command} is not installed. Install it${from ? ` (Debian package ${from})` : ''} and try again.`,
    options,
  )
}

/** A key of Ceph's in the name of a backing file (`rbd:pool/image:id=user:key=…`), which programs print as it is. */
const HEADER_KEY = /\b(key=)[^:"'\s]+/

/** As much of an output as events and errors have, without keys. */
function shown(output: string): string {
  return output.slice(0, OUTPUT_LIMIT).replaceAll(new RegExp(HEADER_KEY, 'g'), '$1…')
}

function lastLine(text: string): string {
  return text.trim().split('\n').at(-1) ?? ''
}
