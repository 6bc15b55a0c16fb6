import { VarveError } from '@varve/core'
import type { FtpConnection } from './connection.ts'
import { isRefusal, protocolError } from './ftp-error.ts'
import { type FolderEntry, listFolder } from './list-folder.ts'

/** What is at a place: nothing, an entry of its folder, or something behind a folder that may not be entered. */
export type Place = FolderEntry['type'] | 'nothing' | 'closed'

/** How often the way to a place may change while it is looked at. */
const ATTEMPTS = 5

/**
 * What is at a place, found out from the listings on the way to it: a server's 550 may mean that nothing is there
 * or that the user may not have it, and vsftpd's does not say which.
 *
 * @throws STORAGE_NOT_FOUND when the root itself is not there; STORAGE_ACCESS_DENIED
 */
export async function whatIsAt(connection: FtpConnection, names: readonly string[]): Promise<Place> {
  for (let attempt = 1; ; attempt++) {
    const place = await lookOnce(connection, names)
    // a folder that could not be entered may have been made a moment ago
    if (place !== 'closed' || attempt === ATTEMPTS) return place
  }
}

async function lookOnce(connection: FtpConnection, names: readonly string[]): Promise<Place> {
  for (let depth = names.length - 1; depth >= 0; depth--) {
    const entries = await listFolder(connection, connection.pathOf(names.slice(0, depth)))
    if (entries === undefined) continue
    const entry = entries.find(({ name }) => name === names[depth])
    if (entry === undefined) return 'nothing'
    if (depth === names.length - 1) return entry.type
    return entry.type === 'folder' ? 'closed' : 'nothing' // nothing is below a file
  }
  const { location, pathPrefix } = connection.settings
  throw new VarveError(
    'STORAGE_NOT_FOUND',
    `The folder of ${location} cannot be entered any more. Make it again, or correct pathPrefix.`,
    { context: { location, pathPrefix } },
  )
}

/** The size of a file; undefined where the server has none to tell. */
export async function sizeOf(connection: FtpConnection, path: string): Promise<number | undefined> {
  try {
    const reply = await connection.command(`SIZE ${path}`)
    const size = Number(/^213[ -](\d+)/.exec(reply.message)?.[1])
    if (Number.isSafeInteger(size)) return size
    throw protocolError('gives no size in its reply to SIZE', reply, connection.settings)
  } catch (error) {
    if (isRefusal(error)) return undefined
    throw error
  }
}

/**
 * When a file was last written (RFC 3659, 3.3): `unknown` from a server that does not tell, `nothing` where no file
 * is there.
 */
export async function timeOf(connection: FtpConnection, path: string): Promise<Date | 'unknown' | 'nothing'> {
  if (!connection.features.has('MDTM')) return 'unknown'
  try {
    const { message } = await connection.command(`MDTM ${path}`)
    const parts = /^213[ -](\d{4})(\d\d)(\d\d)(\d\d)(\d\d)(\d\d)(?:\.(\d{1,3}))?/.exec(message)
    if (!parts) return 'unknown'
    const [year = 0, month = 0, day = 0, hour = 0, minute = 0, second = 0] = parts.slice(1).map(Number)
    const ms = Number((parts[7] ?? '').padEnd(3, '0'))
    return new Date(Date.UTC(year, month - 1, day, hour, minute, second, ms))
  } catch (error) {
    if (isRefusal(error)) return 'nothing'
    throw error
  }
}
