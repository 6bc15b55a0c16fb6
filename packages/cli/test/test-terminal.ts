import { PassThrough } from 'node:stream'
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
  /** Called with what standard error has so far; sends a signal by calling `interrupt`. */
  readonly onStderr?: (text: string, interrupt: (signal: EndSignal) => void) => void
}

/** Runs a command line in this process, without a terminal. */
export async function cli(
  args: readonly string[],
  { cwd, env = {}, onStderr }: CliOptions,
): Promise<CliResult> {
  const [stdout, stderr] = [new PassThrough(), new PassThrough()]
  const stdin = new PassThrough()
  stdin.end()
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
    stdout,
    stderr,
    onSignal(given) {
      listener = given
      return () => {
        listener = undefined
      }
    },
  }
  const code = await runCli(args, terminal)
  return { code, ...text }
}
