import { VarveError } from '@varve/core'
import { type FileInfo, FTPError } from 'basic-ftp'
import type { FtpConnection } from './connection.ts'
import { isRefusal, isReply, timeoutError } from './ftp-error.ts'
import { Transfer } from './transfer.ts'

/** A listing beyond this is no backup folder; some 300,000 entries. */
const LARGEST_LISTING = 64 * 1024 * 1024

/** What a folder holds under a name. */
export interface FolderEntry {
  readonly name: string
  /** `other`: a symbolic link or something else that is neither. */
  readonly type: 'file' | 'folder' | 'other'
  /** Size in bytes, of a file. */
  readonly size: number
  /** When it was last written, where the listing tells it exactly. */
  readonly modifiedAt?: Date
}

/**
 * What is in a folder, hidden files included. Fails with the server's refusal where it cannot be entered or listed:
 * it is not there, is a file, or the user may not.
 */
export async function listFolder(connection: FtpConnection, path: string): Promise<FolderEntry[]> {
  // the folder as the place to list, since what follows LIST may be taken for options or a pattern
  await connection.command(`CWD ${path || '/'}`)
  const entries: FolderEntry[] = []
  for (const entry of await readListing(connection, path)) {
    const { name, isFile, isDirectory, size, modifiedAt } = entry
    if (name === '.' || name === '..') continue
    const type = isFile ? 'file' : isDirectory ? 'folder' : 'other'
    entries.push({ name, type, size, ...(modifiedAt && { modifiedAt }) })
  }
  return entries
}

function parsed({ client, settings }: FtpConnection, text: string, path: string): FileInfo[] {
  try {
    const entries = client.parseList(text)
    const odd = entries.find(({ isFile, size }) => isFile && !(Number.isSafeInteger(size) && size >= 0))
    if (odd) throw new Error(`the file ${odd.name} has ${odd.size} bytes`)
    return entries
  } catch (error) {
    throw new VarveError(
      'STORAGE_FAILED',
      `${settings.location} lists ${path} in a way that is not understood. A server with MLSD, or with listings as of Unix, is needed.`,
      { context: { path }, cause: error },
    )
  }
}

async function readListing(connection: FtpConnection, path: string): Promise<FileInfo[]> {
  if (connection.features.has('MLST')) return readAll(connection, 'MLSD', path) // RFC 3659, 7.8
  if (connection.listsByStat) {
    const entries = await readStatus(connection, path)
    if (entries) return entries
    const listed = await readList(connection, path)
    if (listed.length > 0) connection.listsByStat = false // it has a listing, and did not give it
    return listed
  }
  return readList(connection, path)
}

/**
 * The listing on the control connection (`STAT` of RFC 959, 4.1.3), which has an end mark, as a data connection has not;
 * undefined where the server gives none of a folder with its own `.` in it.
 */
async function readStatus(connection: FtpConnection, path: string): Promise<FileInfo[] | undefined> {
  try {
    const { message } = await connection.command('STAT -a .')
    const lines = message.split(/\r?\n/).slice(1, -1)
    if (!lines.some(line => /^d.*\s\.$/.test(line))) return undefined
    return parsed(connection, lines.join('\n'), path)
  } catch (error) {
    if (isReply(error) && !isReply(error, 421)) return undefined
    throw error
  }
}

async function readList(connection: FtpConnection, path: string): Promise<FileInfo[]> {
  if (connection.listsAll) {
    try {
      return await readAll(connection, 'LIST -a', path)
    } catch (error) {
      if (isReply(error, 500, 501, 504)) connection.listsAll = false
      else if (!isRefusal(error)) throw error // which may also be a folder that was removed a moment ago
    }
  }
  return readAll(connection, 'LIST', path)
}

async function readAll(connection: FtpConnection, command: string, path: string): Promise<FileInfo[]> {
  const transfer = await Transfer.begin(connection, command)
  try {
    const text = (await readSocket(transfer, connection, path)).toString('utf8')
    const reply = await transfer.finish()
    // nothing but its own end tells the end of a listing
    if (text !== '' && !text.endsWith('\n')) throw new Error(`the listing of ${path} ended early`)
    // vsftpd reports a folder that it cannot read as a success, in the words
    if (/fail|denied|cannot|can't/i.test(reply.message)) {
      throw new FTPError({ code: 550, message: reply.message })
    }
    return parsed(connection, text, path)
  } catch (error) {
    throw (await transfer.abandon()) ?? error
  }
}

function readSocket({ socket }: Transfer, { settings }: FtpConnection, path: string): Promise<Buffer> {
  const { timeoutMs } = settings
  const chunks: Buffer[] = []
  let length = 0
  return new Promise<Buffer>((resolve, reject) => {
    const timer = setTimeout(
      () => reject(timeoutError(`the listing of ${path} stands still`, timeoutMs, settings)),
      timeoutMs,
    )
    const onEnd = () => {
      clearTimeout(timer)
      resolve(Buffer.concat(chunks))
    }
    const onClose = () => {
      clearTimeout(timer)
      reject(new Error('the data connection was closed'))
    }
    socket.on('data', chunk => {
      timer.refresh()
      chunks.push(chunk)
      length += chunk.length
      if (length > LARGEST_LISTING) reject(tooLong(path))
    })
    socket.once('error', reject)
    socket.once('end', onEnd)
    socket.once('close', onClose)
    // an empty listing may have ended, and be closed, before the server's reply was here
    if (socket.readableEnded) onEnd()
    else if (socket.closed) onClose()
  })
}

function tooLong(path: string): VarveError {
  return new VarveError(
    'STORAGE_FAILED',
    `The listing of ${path} is longer than ${LARGEST_LISTING} bytes. Is it a folder of backups?`,
    { context: { path } },
  )
}
