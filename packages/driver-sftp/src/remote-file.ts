import { unlessAborted } from '@varve/core'
import ssh2 from 'ssh2'
import type { SftpConnection } from './connection.ts'
import { isStatus, STATUS } from './sftp-error.ts'

const { READ, WRITE, CREAT } = ssh2.utils.sftp.OPEN_MODE
const FILE_MODE = 0o600

/** Opens a file to read it. */
export function openToRead(connection: SftpConnection, path: string, signal?: AbortSignal): Promise<Buffer> {
  return open(connection, path, READ, signal)
}

/** Opens a file to write it, or makes it, empty. */
export function openToWrite(connection: SftpConnection, path: string, signal?: AbortSignal): Promise<Buffer> {
  return open(connection, path, READ | WRITE | CREAT, signal)
}

async function open(
  connection: SftpConnection,
  path: string,
  flags: number,
  signal: AbortSignal | undefined,
): Promise<Buffer> {
  const opening = connection.call<Buffer>((sftp, done) => sftp.open(path, flags, { mode: FILE_MODE }, done))
  try {
    return await unlessAborted(opening, signal)
  } catch (error) {
    if (signal?.aborted) {
      // nobody waits for the handle any more, and a server has only so many
      opening.then(handle => close(connection, handle)).catch(() => undefined)
    }
    throw error
  }
}

/**
 * Closes a file. To be called once and with no request for the handle under way: a server may give the same handle to
 * the next file that is opened.
 */
export async function close(connection: SftpConnection, handle: Buffer): Promise<void> {
  await connection.call((sftp, done) => sftp.close(handle, done), { flush: true })
}

/** Makes what is written to an open file durable and tells whether the server can. */
export async function sync(connection: SftpConnection, handle: Buffer): Promise<boolean> {
  try {
    await connection.call((sftp, done) => sftp.ext_openssh_fsync(handle, done), { flush: true })
    return true
  } catch (error) {
    if (isStatus(error, STATUS.OP_UNSUPPORTED)) return false
    throw error
  }
}
