import { setTimeout as sleep } from 'node:timers/promises'
import { VarveError } from '@varve/core'
import type { FtpConnection } from './connection.ts'
import { isFolder } from './folders.ts'
import { deniedError, isRefusal, protocolError } from './ftp-error.ts'
import { type FolderEntry, listFolder } from './list-folder.ts'

/** What is at a place: nothing, an entry of its folder, or something behind a folder that may not be entered. */
type Place = FolderEntry['type'] | 'nothing' | 'closed'

/** What may be at a place without being what was asked for. */
const ABSENT: Readonly<Record<'object' | 'folder', readonly Place[]>> = {
  object: ['nothing', 'folder'],
  folder: ['nothing', 'file', 'other'],
}

/** How often something must be refused, and be seen to be there, to count as denied. */
export const REFUSALS = 10
const LONGEST_PAUSE_MS = 200

/** Options of {@link unlessMissing}. */
export interface UnlessMissingOptions {
  /** The names of the path that is worked on. */
  readonly names: readonly string[]
  readonly wanted: 'object' | 'folder'
  /** What is done, for messages. */
  readonly doing: string
}

/**
 * Does something to an object or a folder; undefined where there is none.
 *
 * A server refuses alike what is not there and what the user may not have, and the listings that tell them apart come
 * a moment later, when others may have made what was missing. So it is tried again: what is denied is refused every
 * time, what comes and goes is not.
 *
 * @throws STORAGE_ACCESS_DENIED; STORAGE_NOT_FOUND when the root itself is not there
 */
export async function unlessMissing<T>(
  connection: FtpConnection,
  { names, wanted, doing }: UnlessMissingOptions,
  work: () => Promise<T>,
): Promise<T | undefined> {
  for (let refusals = 1; ; refusals++) {
    try {
      return await work()
    } catch (error) {
      if (!isRefusal(error)) throw error
      const place = await whatIsAt(connection, names)
      if (ABSENT[wanted].includes(place)) return undefined
      if (refusals < REFUSALS) {
        await pauseAfter(refusals)
        continue
      }
      const why = place === 'closed' ? new Error('a folder on the way may not be entered') : error
      throw deniedError(why, doing, connection.settings)
    }
  }
}

/** Waits for a random time, so as not to keep in step with those who make and remove what is looked for. */
export async function pauseAfter(refusals: number): Promise<void> {
  await sleep(Math.random() * Math.min(2 ** refusals, LONGEST_PAUSE_MS))
}

/**
 * Fails unless the root is there.
 *
 * @throws STORAGE_NOT_FOUND
 */
export async function expectRoot(connection: FtpConnection): Promise<void> {
  if (await isFolder(connection, [])) return
  const { location, pathPrefix } = connection.settings
  throw new VarveError(
    'STORAGE_NOT_FOUND',
    `The folder of ${location} cannot be entered any more. Make it again, or correct pathPrefix.`,
    { context: { location, pathPrefix } },
  )
}

/** What is at a place by the listings on the way to it. */
async function whatIsAt(connection: FtpConnection, names: readonly string[]): Promise<Place> {
  for (let depth = names.length - 1; depth >= 0; depth--) {
    let entries: FolderEntry[]
    try {
      entries = await listFolder(connection, connection.pathOf(names.slice(0, depth)))
    } catch (error) {
      if (isRefusal(error)) continue
      throw error
    }
    const entry = entries.find(({ name }) => name === names[depth])
    if (entry === undefined) return 'nothing'
    if (depth === names.length - 1) return entry.type
    return entry.type === 'folder' ? 'closed' : 'nothing' // nothing is below a file
  }
  await expectRoot(connection)
  return names.length === 0 ? 'folder' : 'closed'
}

/** The size of a file; undefined where the server has none to tell. */
export async function sizeOf(connection: FtpConnection, path: string): Promise<number | undefined> {
  try {
    return await askSize(connection, path)
  } catch (error) {
    if (isRefusal(error)) return undefined
    throw error
  }
}

/** The size of a file; fails with the server's refusal where it has none to tell. */
export async function askSize(connection: FtpConnection, path: string): Promise<number> {
  const reply = await connection.command(`SIZE ${path}`)
  const size = Number(/^213[ -](\d+)/.exec(reply.message)?.[1])
  if (Number.isSafeInteger(size)) return size
  throw protocolError('gives no size in its reply to SIZE', reply, connection.settings)
}

/**
 * When a file was last written (RFC 3659, 3.3), or `unknown` from a server that does not tell. Fails with the server's
 * refusal where no file is there.
 */
export async function askTime(connection: FtpConnection, path: string): Promise<Date | 'unknown'> {
  if (!connection.features.has('MDTM')) return 'unknown'
  let message: string
  try {
    message = (await connection.command(`MDTM ${path}`)).message
  } catch (error) {
    if (!isRefusal(error)) throw error
    await askSize(connection, path) // a user may be denied MDTM alone
    return 'unknown'
  }
  const parts = /^213[ -](\d{4})(\d\d)(\d\d)(\d\d)(\d\d)(\d\d)(?:\.(\d{1,3}))?/.exec(message)
  if (!parts) return 'unknown'
  const [year = 0, month = 0, day = 0, hour = 0, minute = 0, second = 0] = parts.slice(1).map(Number)
  const ms = Number((parts[7] ?? '').padEnd(3, '0'))
  return new Date(Date.UTC(year, month - 1, day, hour, minute, second, ms))
}
