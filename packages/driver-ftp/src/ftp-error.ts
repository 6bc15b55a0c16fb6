import { errorMessage, isVarveError, VarveError } from '@varve/core'
import { FTPError, type FTPResponse } from 'basic-ftp'
import type { FtpSettings } from './ftp-options.ts'

/** Whether `error` is a server's reply; with `codes`, one of these. */
export function isReply(error: unknown, ...codes: number[]): error is FTPError {
  return error instanceof FTPError && (codes.length === 0 || codes.includes(error.code))
}

/** Whether the server refused to do something to a file or folder, for whatever reason: RFC 959, 4.2.1. */
export function isRefusal(error: unknown): error is FTPError {
  return isReply(error, 450, 521, 550, 553)
}

/** Whether the server turned a connection away because there are too many of them. */
export function isTooMany(error: unknown): boolean {
  const cause = isVarveError(error) ? error.cause : error
  return isReply(cause, 421) || (isReply(cause, 530) && /too many|maximum|limit/i.test(cause.message))
}

/** Any error as one that says what was done, what came of it, and what to do now. */
export function ftpError(error: unknown, doing: string, settings: FtpSettings): VarveError {
  if (isVarveError(error)) return error
  if (isReply(error)) return replyError(withoutPassword(error, settings), doing, settings)
  const { location } = settings
  const code = systemCode(error)
  const options = { context: { location, errno: code }, cause: error }
  if (code !== undefined && isTlsCode(code)) return tlsError(error, settings)
  const [reason, retryable] = REASONS[code ?? ''] ?? [
    `the connection was lost (${errorMessage(error)})`,
    true,
  ]
  return new VarveError(
    'STORAGE_UNREACHABLE',
    `${doing} failed: ${location}: ${reason}. Check the server, its address and the network.`,
    { ...options, retryable },
  )
}

/** The error of a TLS handshake, or of a server that offers none. */
export function tlsError(error: unknown, settings: FtpSettings): VarveError {
  const { location, tls } = settings
  const code = systemCode(error)
  const why = isReply(error) ? replyText(error, settings) : errorMessage(error)
  const remedy = isReply(error)
    ? 'Set tls to implicit or none if that is what the server has; with none, everyone on the way can read the password'
    : code?.startsWith('ERR_TLS_CERT_ALTNAME')
      ? 'Use the name that the certificate is for as host, or give it as tlsServerName'
      : `Check that the port speaks TLS (${tls}), and give the certificate of the server's authority as ca if it is not a well-known one`
  return new VarveError('STORAGE_UNREACHABLE', `No TLS connection to ${location}: ${why}. ${remedy}.`, {
    context: { location, errno: code },
    cause: error,
  })
}

/** The error of a server that was silent for too long. */
export function timeoutError(what: string, timeoutMs: number, settings: FtpSettings): VarveError {
  const { location } = settings
  return new VarveError(
    'TIMEOUT',
    `${location} gave no sign of life for ${timeoutMs / 1000} seconds: ${what}. Check the server and the network.`,
    { context: { location, timeoutMs }, retryable: true },
  )
}

/** The error of a server whose reply makes no sense. */
export function protocolError(what: string, reply: FTPResponse, settings: FtpSettings): VarveError {
  const { location } = settings
  return new VarveError(
    'STORAGE_FAILED',
    `${location} ${what}: ${replyText(reply, settings)}. Is it an FTP server?`,
    { context: { location, reply: reply.code } },
  )
}

/** A reply as text for people: one line, without the password, should a server send it back. */
export function replyText(error: { message: string }, { password }: FtpSettings): string {
  const text = error.message.replace(/[^\P{C} ]+/gu, ' ').slice(0, 300)
  return (password === '' ? text : text.replaceAll(password, '***')).replace(/\.$/, '')
}

function withoutPassword(error: FTPError, { password }: FtpSettings): FTPError {
  if (password === '' || !error.message.includes(password)) return error
  return new FTPError({ code: error.code, message: error.message.replaceAll(password, '***') })
}

function replyError(error: FTPError, doing: string, settings: FtpSettings): VarveError {
  const { location } = settings
  const what = `${doing} failed: ${location} says: ${replyText(error, settings)}`
  const options = { context: { location, reply: error.code }, cause: error }
  switch (error.code) {
    case 421:
      return new VarveError(
        'STORAGE_UNREACHABLE',
        `${what}. The server ended the connection; it may allow fewer connections, or be about to stop.`,
        { ...options, retryable: true },
      )
    case 425:
    case 426:
      return new VarveError(
        'STORAGE_UNREACHABLE',
        `${what}. The data connection failed: check that the server's passive ports are open.`,
        { ...options, retryable: true },
      )
    case 452:
    case 552:
      return full(what, options)
    case 451:
      // vsftpd gives no other reason when the disk or the quota is full
      return /writ/i.test(error.message)
        ? full(what, options)
        : new VarveError('STORAGE_FAILED', `${what}. Look at the server's log.`, {
            ...options,
            retryable: true,
          })
    case 430:
    case 530:
    case 532:
      return new VarveError(
        'STORAGE_ACCESS_DENIED',
        `${what}. Check the username and the password, and that the user may log in${settings.tls === 'none' ? '; a server that wants TLS needs tls set to explicit' : ''}.`,
        options,
      )
    case 522:
    case 534:
      return tlsError(error, settings)
    case 450:
      return new VarveError('STORAGE_FAILED', `${what}. The file is busy; try again.`, {
        ...options,
        retryable: true,
      })
  }
  if (/permission|denied|not (allowed|permitted)|read.?only/i.test(error.message)) {
    return deniedError(error, doing, settings)
  }
  return new VarveError('STORAGE_FAILED', `${what}. Look at the server's log.`, options)
}

/** The error of a server that refuses something to this user. */
export function deniedError(error: unknown, doing: string, settings: FtpSettings): VarveError {
  const { location } = settings
  const why = isReply(error) ? replyText(error, settings) : errorMessage(error)
  return new VarveError(
    'STORAGE_ACCESS_DENIED',
    `${doing} is refused by ${location}: ${why}. Give the user the permission to list, read, write, rename and delete in the folder.`,
    { context: { location, reply: isReply(error) ? error.code : undefined }, cause: error },
  )
}

function full(what: string, options: object): VarveError {
  return new VarveError(
    'STORAGE_FULL',
    `${what}. Its disk is full, or the user's quota is used up. Delete or prune backups, or add space.`,
    options,
  )
}

/** By Node's code: why, and whether another try may help. */
const REASONS: Readonly<Record<string, readonly [reason: string, retryable: boolean]>> = {
  ENOTFOUND: ['the host is not known', false],
  EAI_AGAIN: ['the host could not be looked up, since no name server answers', true],
  ECONNREFUSED: ['the connection was refused; no FTP server listens there', true],
  ECONNRESET: ['the connection was reset', true],
  EPIPE: ['the connection was closed', true],
  ETIMEDOUT: ['the connection timed out', true],
  EHOSTUNREACH: ['there is no way to the host', true],
  ENETUNREACH: ['there is no way to the network of the host', true],
}

function systemCode(error: unknown): string | undefined {
  return error instanceof Error && 'code' in error && typeof error.code === 'string' ? error.code : undefined
}

function isTlsCode(code: string): boolean {
  return /^(ERR_TLS_|ERR_SSL_|CERT_|CRL_|DEPTH_ZERO_|SELF_SIGNED_|UNABLE_TO_|INVALID_CA$|EPROTO$|HOSTNAME_MISMATCH$)/.test(
    code,
  )
}
