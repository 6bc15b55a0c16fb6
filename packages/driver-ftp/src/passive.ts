import { once } from 'node:events'
import { connect, type Socket } from 'node:net'
import { connect as connectTls } from 'node:tls'
import { VarveError } from '@varve/core'
import type { FTPResponse } from 'basic-ftp'
import type { FtpConnection } from './connection.ts'
import { isReply, protocolError } from './ftp-error.ts'

/**
 * Opens a data connection to the server. It goes to the host of the control connection: the address in a reply
 * to `PASV` is wrong behind many routers, and could send the data to somebody else.
 *
 * With TLS, its handshake has only begun: a server may begin its own part after the command for the transfer.
 */
export async function openDataConnection(connection: FtpConnection): Promise<Socket> {
  const port = await passivePort(connection)
  const raw = connect({ host: connection.remoteAddress, port, noDelay: true })
  try {
    await connection.answered(once(raw, 'connect'), `no data connection to port ${port}`)
  } catch (error) {
    raw.destroy()
    raw.on('error', () => undefined)
    throw dataConnectionError(error, port, connection)
  }
  return connection.settings.tls === 'none' ? raw : encrypt(raw, connection)
}

function encrypt(raw: Socket, { client: { ftp }, settings }: FtpConnection): Socket {
  const control = ftp.socket
  // The session of the control connection, so that the server knows whom it talks to (vsftpd insists on it).
  const session = ftp.tlsSessionStore ?? ('getSession' in control ? control.getSession() : undefined)
  const socket = connectTls({ ...settings.tlsOptions, socket: raw, ...(session && { session }) })
  // a ticket of TLS 1.3 is good for one connection; each one brings the next
  socket.on('session', next => {
    ftp.tlsSessionStore = next
  })
  return socket
}

async function passivePort(connection: FtpConnection): Promise<number> {
  if (connection.extendedPassive) {
    try {
      const reply = await connection.command('EPSV')
      return portFrom(/\((.)\1\1(\d{1,5})\1\)/.exec(reply.message)?.[2], reply, connection)
    } catch (error) {
      if (!isReply(error, 500, 501, 502, 504, 522, 550)) throw error
      connection.extendedPassive = false
    }
  }
  const reply = await connection.command('PASV')
  const numbers = /(?<!\d)\d{1,3},\d{1,3},\d{1,3},\d{1,3},(\d{1,3}),(\d{1,3})(?!\d)/.exec(reply.message)
  return portFrom(
    numbers ? String(Number(numbers[1]) * 256 + Number(numbers[2])) : undefined,
    reply,
    connection,
  )
}

function portFrom(text: string | undefined, reply: FTPResponse, { settings }: FtpConnection): number {
  const port = Number(text)
  if (port >= 1 && port <= 65_535) return port
  throw protocolError('names no port for a data connection', reply, settings)
}

function dataConnectionError(error: unknown, port: number, { settings }: FtpConnection): VarveError {
  const { location } = settings
  return new VarveError(
    'STORAGE_UNREACHABLE',
    `${location} takes no data connection on its port ${port}. Open the server's passive ports in the firewall.`,
    { context: { location, port }, cause: error, retryable: true },
  )
}
