import type { Readable, Writable } from 'node:stream'

/** What the command is run in: the process's own streams, or those of a test. */
export interface Terminal {
  readonly env: Readonly<Record<string, string | undefined>>
  /** Where relative paths begin. */
  readonly cwd: string
  readonly stdin: Readable & { readonly isTTY?: boolean | undefined }
  readonly stdout: Writable
  readonly stderr: Writable & { readonly isTTY?: boolean | undefined; readonly columns?: number | undefined }
  /** Calls the listener for every signal that asks to end, from now on to the end of the process. */
  onSignal(listener: (signal: EndSignal) => void): void
}

/** The signals that ask to end: Ctrl-C, `kill`, and the end of an SSH session. */
export type EndSignal = (typeof END_SIGNALS)[number]

const END_SIGNALS = ['SIGINT', 'SIGTERM', 'SIGHUP'] as const

/** The terminal that this process was started in. */
export function processTerminal(): Terminal {
  const { env, stdin, stdout, stderr } = process
  for (const stream of [stdout, stderr]) {
    // Who reads the output has gone, such as `head`, or an SSH session: a backup goes on without. That its result could
    // not be written is for `writeText` to tell.
    stream.on('error', () => undefined)
  }
  return {
    env,
    cwd: process.cwd(),
    stdin,
    stdout,
    stderr,
    onSignal(listener) {
      for (const signal of END_SIGNALS) process.on(signal, () => listener(signal))
    },
  }
}
