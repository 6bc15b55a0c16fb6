import { VarveError } from '@varve/core'

/** The object that an rclone has printed. @throws STORAGE_FAILED, with the name of the command */
export function parseObject(json: string, command: string): Record<string, unknown> {
  try {
    const value: unknown = JSON.parse(json)
    if (typeof value === 'object' && value !== null) return value as Record<string, unknown>
  } catch {
    // told below
  }
  throw unreadable(json, command)
}

/** The error of an rclone that has printed something else than it should. */
export function unreadable(json: string, command: string): VarveError {
  return new VarveError(
    'STORAGE_FAILED',
    `rclone ${command} printed something that it should not: ${JSON.stringify(json.slice(0, 80))}. Is command really rclone?`,
  )
}
