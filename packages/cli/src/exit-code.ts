import { isVarveError } from '@varve/core'
import { CommanderError } from 'commander'

/** What the exit code of `varve` says. */
export const EXIT = {
  done: 0,
  failed: 1,
  /** Bad arguments or a bad configuration: nothing was done. */
  usage: 2,
  /** Done, but a host needs someone to look at it. */
  attention: 3,
} as const

/** An exit code of `varve`. */
export type ExitCode = (typeof EXIT)[keyof typeof EXIT]

/** The exit code of a command that ended with this error. */
export function exitCodeOf(error: unknown): ExitCode {
  if (error instanceof CommanderError) return error.exitCode === 0 ? EXIT.done : EXIT.usage
  if (!isVarveError(error)) return EXIT.failed
  const { published, restored } = error.context
  if (published !== undefined || restored !== undefined) return EXIT.attention
  return error.code === 'INVALID_ARGUMENT' || error.code === 'INVALID_CONFIG' ? EXIT.usage : EXIT.failed
}

/** The exit code of a command with several outcomes: that a host needs attention goes before all else. */
export function worst(...codes: readonly ExitCode[]): ExitCode {
  const order = [EXIT.attention, EXIT.usage, EXIT.failed]
  return order.find(code => codes.includes(code)) ?? EXIT.done
}
