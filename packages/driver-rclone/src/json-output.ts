import { VarveError } from '@varve/core'

/** How much of an output is quoted, in characters. */
const QUOTED = 80

/** Takes the secrets out of a text. */
export type Redact = (text: string) => string

/** The object that an rclone has printed. @throws STORAGE_FAILED, with the name of the command */
export function parseObject(json: string, command: string, redact: Redact): Record<string, unknown> {
  try {
    const value: unknown = JSON.parse(json)
    if (typeof value === 'object' && value !== null) return value as Record<string, unknown>
  } catch {
    // told below
  }
  throw unreadable(json, command, redact)
}

/** The error of an rclone that has printed something else than it should. */
export function unreadable(json: string, command: string, redact: Redact): VarveError {
  const begin = redact(json).slice(0, QUOTED) // not the other way round, which would cut a secret in two
  return new VarveError(
    'STORAGE_FAILED',
    `rclone ${command} printed something that it should not: ${JSON.stringify(begin)}. Is command really rclone?`,
  )
}
