import { PassThrough, type Writable } from 'node:stream'
import { runCli } from '../src/cli.ts'
import type { EndSignal, Terminal } from '../src/terminal.ts'

/** What a command line came to. */
export interface CliResult {
  readonly code: number
  readonly stdout: string
  readonly stderr: string
}

/** Options of {@link cli}. */
export interface CliOptions {
  readonly cwd: string
  readonly env?: Record<string, string>
  /** What is typed: standard input and standard error are then a terminal. */
  readonly typed?: string
  /** Whether standard input stays open after what is typed. Default: it ends. */
  readonly open?: boolean
  /** Takes standard output in place of the result. */
  readonly output?: Writable
  /** Called with what standard error has so far; sends a signal by calling `interrupt`. */
  readonly onStderr?: (text: string, interrupt: (signal: EndSignal) => void) => void
}

/** Runs a command line in this process, without a terminal unless something is typed. */
export async function cli(
  args: readonly string[],
  { cwd, env = {}, typed, open, output, onStderr }: CliOptions,
): Promise<CliResult> {
  const isTTY = typed !== undefined
  const stdout = new PassThrough()
  const stderr = Object.assign(new PassThrough(), { isTTY })
  const stdin = Object.assign(new PassThrough(), { isTTY })
  stdin.write(typed ?? '')
  if (!open) stdin.end()
  let listener: ((signal: EndSignal) => void) | undefined
  const text = { stdout: '', stderr: '' }
  stdout.setEncoding('utf8').on('data', (chunk: string) => {
    text.stdout += chunk
  })
  stderr.setEncoding('utf8').on('data', (chunk: string) => {
    text.stderr += chunk
    onStderr?.(text.stderr, signal => listener?.(signal))
  })
  const terminal: Terminal = {
    env,
    cwd,
    stdin,
    stdout: output ?? stdout,
    stderr,
    onSignal(given) {
      listener = given
    },
  }
  const code = await runCli(args, terminal)
  return { code, ...text }
}
