import { createInterface } from 'node:readline'
import { VarveError } from '@varve/core'
import { printable } from './printable.ts'
import type { Session } from './session.ts'

/** What is asked for before something is replaced or deleted. */
export interface Question {
  /** What will happen. */
  readonly text: string
  /** What to type for it; `y` and `yes` do as well. */
  readonly answer: string
}

/**
 * Asks on the terminal whether to go on.
 *
 * @throws INVALID_ARGUMENT where there is no terminal to ask on, ABORTED when the answer is another one
 */
export async function confirm(session: Session, { text, answer }: Question): Promise<void> {
  const { stdin, stderr } = session.terminal
  if (!stdin.isTTY || !stderr.isTTY) {
    throw new VarveError('INVALID_ARGUMENT', `${text} Add --yes if that is what you want.`)
  }
  stderr.write(printable(`${text}\nType ${answer} or y to go on: `))
  const typed = await readAnswer(session)
  if (![answer, 'y', 'yes'].includes(typed.trim()))
    throw new VarveError('ABORTED', 'Not confirmed, so nothing was changed.')
}

async function readAnswer({ terminal, signal }: Session): Promise<string> {
  const lines = createInterface({ input: terminal.stdin, signal })
  let answer = '' // also when the input ends, or the interface is closed by an abort
  for await (const line of lines) {
    answer = line
    break
  }
  signal.throwIfAborted()
  return answer
}
