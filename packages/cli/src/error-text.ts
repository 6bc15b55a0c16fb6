import { errorMessage, isVarveError, type VarveError } from '@varve/core'
import { CommanderError } from 'commander'
import { EXIT, exitCodeOf } from './exit-code.ts'

/** How {@link errorText} is to tell of an error. */
export interface ErrorTextOptions {
  /** With the details and the errors that led to it. */
  verbose: boolean
}

/** An error for people: what happened and what to do, and its code. */
export function errorText(error: unknown, { verbose }: ErrorTextOptions): string {
  if (error instanceof CommanderError) {
    return `${sentence(error.message.replace(/^error: /, ''))}\n  Add --help to see how the command is used.`
  }
  if (!isVarveError(error)) {
    const said =
      error instanceof Error ? (verbose ? (error.stack ?? error.message) : error.message) : String(error)
    return `Something that varve does not expect: ${said}${verbose ? '' : '\n  Add --verbose to see where it comes from.'}`
  }
  const lines = [error.message, `  code: ${error.code}`]
  if (exitCodeOf(error) === EXIT.attention)
    lines.push(`  ${doneAllTheSame(error)}; the host needs attention.`)
  if (verbose) lines.push(...contextLines(error.context), ...causeLines(error.cause))
  if (verbose && error.code === 'UNEXPECTED' && error.cause instanceof Error)
    lines.push(error.cause.stack ?? '')
  return lines.join('\n')
}

function doneAllTheSame({ context: { published } }: VarveError): string {
  if (published !== undefined) return `The backup ${published} is complete and can be restored`
  return 'The restore is complete'
}

/** An error for programs: the document of `--json` where a command has no result. */
export function errorDocument(error: unknown): object {
  if (isVarveError(error)) {
    const { code, message, context, retryable } = error
    return { error: { code, message, context, retryable } }
  }
  if (!(error instanceof CommanderError))
    return { error: { code: 'UNEXPECTED', message: errorMessage(error) } }
  const isHelp = error.code === 'commander.help' // shown instead of an error
  const message = isHelp ? 'A command that varve knows is needed. Add --help to see them.' : error.message
  return { error: { code: 'USAGE', message } }
}

function contextLines(context: object): string[] {
  return Object.entries(context)
    .filter(([name, value]) => value !== undefined && name !== 'stderr')
    .map(([name, value]) => `  ${name}: ${Array.isArray(value) ? value.join(' ') : value}`)
}

function causeLines(cause: unknown): string[] {
  const lines: string[] = []
  const seen = new Set<unknown>()
  const visit = (error: unknown) => {
    if (error === undefined || seen.has(error)) return
    seen.add(error)
    if (error instanceof AggregateError) return error.errors.forEach(visit)
    const code = error instanceof Error && 'code' in error ? ` (${String(error.code)})` : ''
    const [said] = errorMessage(error).split('\n') // the output of a program follows, which is shown with it
    lines.push(`  caused by: ${said}${code}`)
    if (error instanceof Error) visit(error.cause)
  }
  visit(cause)
  return lines
}

function sentence(text: string): string {
  return text.replace(/^./, first => first.toUpperCase())
}
