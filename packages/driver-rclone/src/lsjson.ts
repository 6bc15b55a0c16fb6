import type { Readable } from 'node:stream'
import { type Redact, unreadable } from './json-output.ts'

const COMMAND = 'lsjson'

/** A file that rclone tells of. */
export interface RemoteFile {
  /** Its path below the folder that was listed. */
  readonly path: string
  /** Size in bytes. */
  readonly size: number
  /** When it was last written, by the server's clock, where the remote tells. */
  readonly modifiedAt?: Date
}

/** The longest line: a path of 1024 bytes, escaped, and the rest. */
const LONGEST_LINE = 1024 * 1024

/** One line of `rclone lsjson`: an entry, or undefined for what stands around them. @throws STORAGE_FAILED */
export function parseLine(line: string, redact: Redact): RemoteFile | undefined {
  const text = line.trim().replace(/,$/, '')
  if (text === '' || text === '[' || text === ']') return undefined
  return toFile(parseJson(text, redact), redact)
}

/** What `rclone lsjson --stat` prints: a file, or undefined for a folder or nothing. @throws STORAGE_FAILED */
export function parseStat(text: string, redact: Redact): RemoteFile | undefined {
  const entry = parseJson(text, redact)
  if (entry === null || (typeof entry === 'object' && 'IsDir' in entry && entry.IsDir === true))
    return undefined
  return toFile(entry, redact)
}

/**
 * The lines of what `rclone lsjson` prints, each with one entry, as they come.
 *
 * @throws STORAGE_FAILED
 */
export async function* readLines(output: Readable, redact: Redact): AsyncGenerator<string> {
  let rest = ''
  const decoder = new TextDecoder()
  for await (const chunk of output) {
    rest += decoder.decode(chunk, { stream: true })
    const lines = rest.split('\n')
    rest = lines.pop() ?? ''
    yield* lines
    if (rest.length > LONGEST_LINE) throw unreadable(rest, COMMAND, redact)
  }
  if (rest !== '') yield rest
}

function parseJson(text: string, redact: Redact): unknown {
  try {
    return JSON.parse(text)
  } catch {
    throw unreadable(text, COMMAND, redact)
  }
}

function toFile(entry: unknown, redact: Redact): RemoteFile | undefined {
  if (typeof entry !== 'object' || entry === null) throw unreadable(String(entry), COMMAND, redact)
  const { Path, Size, ModTime } = entry as Record<string, unknown>
  if (typeof Path !== 'string' || typeof Size !== 'number' || !Number.isSafeInteger(Size))
    throw unreadable(JSON.stringify(entry), COMMAND, redact)
  if (Size < 0) return undefined // a document that exists only by its export, and is none of ours
  const modifiedAt = typeof ModTime === 'string' ? new Date(ModTime) : undefined
  const known = modifiedAt !== undefined && !Number.isNaN(modifiedAt.getTime())
  return { path: Path, size: Size, ...(known && { modifiedAt }) }
}
