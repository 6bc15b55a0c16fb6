import type { CommandEvent, VarveEvent } from '@varve/core'

/** What is told of an event beside the progress; nothing for events that are not for this reader. */
export function eventText(event: VarveEvent, { verbose }: { verbose: boolean }): string | undefined {
  switch (event.type) {
    case 'stage':
      return event.message
    case 'fallback':
      return event.message
    case 'warning':
      return `Warning: ${event.message}`
    case 'command':
      return verbose ? commandText(event) : undefined
    case 'progress':
      return undefined
  }
}

function commandText({ command, args, exitCode, stderr, durationMs }: CommandEvent): string {
  const line = [command, ...args].map(quote).join(' ')
  const outcome = exitCode === undefined ? 'ended by a signal or not started' : `exit ${exitCode}`
  const said = stderr.trim()
  return [`$ ${line}  # ${outcome}, ${durationMs} ms`, ...(said === '' ? [] : said.split('\n'))].join(
    '\n    ',
  )
}

/** An argument as a shell would need it. */
export function quote(argument: string): string {
  return /^[\w@%+=:,./-]+$/.test(argument) ? argument : `'${argument.replaceAll("'", String.raw`'\''`)}'`
}
