import type { Readable, Writable } from 'node:stream'

/** What the command is run in: the process's own streams, or those of a test. */
export interface Terminal {
  readonly env: Readonly<Record<string, string | undefined>>
  /** Where relative paths begin. */
  readonly cwd: string
  readonly stdin: Readable & { readonly isTTY?: boolean | undefined }
  readonly stdout: Writable
  readonly stderr: Writable & { readonly isTTY?: boolean | undefined; readonly columns?: number | undefined }
  /** Calls the listener for every signal that asks to end, until the function that it returns is called. */
  onSignal(listener: (signal: EndSignal) => void): () => void
}

/** The signals that ask to end: Ctrl-C, `kill`, and the end of an SSH session. */
export type EndSignal = (typeof END_SIGNALS)[number]

const END_SIGNALS = ['SIGINT', 'SIGTERM', 'SIGHUP'] as const

/** The terminal that this process was started in. */
export function processTerminal(): Terminal {
  const { env, stdin, stdout, stderr } = process
  for (const stream of [stdout, stderr]) {
    // Who reads the output has gone, such as `head`, or an SSH session: a backup goes on without.
    stream.on('error', () => undefined)
  }
  return {
    env,
    cwd: process.cwd(),
    stdin,
    stdout,
    stderr,
    onSignal(listener) {
      const handler = (signal: NodeJS.Signals) => {
        const known = END_SIGNALS.find(name => name === signal)
        if (known) listener(known)
      }
      for (const signal of END_SIGNALS) process.on(signal, handler)
      return () => {
        for (const signal of END_SIGNALS) process.off(signal, handler)
      }
    },
  }
}
