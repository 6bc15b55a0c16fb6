import { isIP } from 'node:net'
import type { ConnectionOptions } from 'node:tls'
import { VarveError } from '@varve/core'

/** Options of {@link FtpDriver}. */
export interface FtpDriverOptions {
  /** The server's name or address. */
  host: string
  /** The port of the control connection. Default: 21, or 990 with `tls: 'implicit'`. */
  port?: number
  /** The user's name. */
  username: string
  /** The user's password. */
  password: string
  /**
   * The folder on the server that holds the backups: absolute, or relative to the folder that a login begins in.
   * It must be there, unless `create` is set. Default: the folder that a login begins in.
   */
  pathPrefix?: string
  /** Makes the folder of `pathPrefix` where it is missing. Default: false, since a missing folder is mostly a wrong path. */
  create?: boolean
  /**
   * `explicit`: the connection is encrypted by `AUTH TLS` before the password is sent. `implicit`: encrypted from
   * the first byte. `none`: password and backups can be read by everyone on the way. There is no falling back from
   * one to the other. Default: `explicit`.
   */
  tls?: 'explicit' | 'implicit' | 'none'
  /**
   * Certificates (PEM) of authorities to trust in place of the well-known ones; also the server's own certificate
   * where that is self-signed. Default: the well-known authorities.
   */
  ca?: string
  /** The name that the server's certificate must be for. Default: `host`. */
  tlsServerName?: string
  /**
   * Connections to the server at once. One of them is kept free for look-ups, listings and what reads up to 1 MiB or stores
   * up to 16 MiB of a known size, so that one less can transfer images, where there are several; of four or more another is
   * kept free for downloads. A download holds one until it is read to its end or destroyed. What is more waits. A server that
   * allows fewer is asked for no more, for a minute: where it is known to, set this to what it allows. Default: 4.
   */
  connections?: number
  /** Milliseconds that the server may be silent while it is its turn; a slow source or reader does not count. Default: 30,000. */
  timeoutMs?: number
  /**
   * How often a call is tried whose connection fails. An upload that went on in the meantime begins to count anew.
   * Default: 5, over some 4 seconds.
   */
  attempts?: number
}

/** {@link FtpDriverOptions}, checked and with their defaults. */
export interface FtpSettings {
  readonly host: string
  readonly port: number
  readonly username: string
  readonly password: string
  readonly pathPrefix: string
  readonly create: boolean
  readonly tls: 'explicit' | 'implicit' | 'none'
  /** For the control connection and, with its session, for each data connection. */
  readonly tlsOptions: ConnectionOptions
  readonly connections: number
  readonly timeoutMs: number
  readonly attempts: number
  /** For people. */
  readonly location: string
}

/** @throws INVALID_CONFIG */
export function checkOptions(options: FtpDriverOptions): FtpSettings {
  const { host, username, password, pathPrefix = '', create = false, tls = 'explicit', ca } = options
  if (host === '' || !/^[\w.:%-]+$/.test(host)) {
    throw invalid('host', 'It must be the name or address of a server, such as nas.example.org')
  }
  if (!['explicit', 'implicit', 'none'].includes(tls)) {
    throw invalid('tls', 'It must be explicit, implicit or none')
  }
  if (tls === 'none' && ca !== undefined) throw invalid('ca', 'There is no certificate without TLS')
  if (username === '' || hasControl(username)) {
    throw invalid('username', 'It must be a name without control characters')
  }
  if (hasControl(password)) throw invalid('password', 'It cannot have control characters in it')
  if (hasControl(pathPrefix) || pathPrefix.split('/').includes('..')) {
    throw invalid('pathPrefix', 'It must be the path of a folder, without ".." and control characters')
  }
  const port = whole('port', options.port ?? (tls === 'implicit' ? 990 : 21), 1, 65_535)
  const name = options.tlsServerName ?? host
  const scheme = tls === 'none' ? 'ftp' : 'ftps'
  return {
    host,
    port,
    username,
    password,
    pathPrefix,
    create,
    tls,
    // a name for SNI and the certificate; an address may be in a certificate, but not in SNI
    tlsOptions: {
      host: name,
      ...(isIP(name) ? {} : { servername: name }),
      ...(ca === undefined ? {} : { ca }),
    },
    connections: whole('connections', options.connections ?? 4, 1, 100),
    timeoutMs: whole('timeoutMs', options.timeoutMs ?? 30_000, 1, 24 * 3_600_000),
    attempts: whole('attempts', options.attempts ?? 5, 1, 100),
    // an absolute path has two slashes before it, which tell it from one in the folder that a login begins in
    location: `${scheme}://${encodeURIComponent(username)}@${isIP(host) === 6 ? `[${host}]` : host}:${port}/${pathPrefix}`,
  }
}

function hasControl(text: string): boolean {
  // biome-ignore lint/suspicious/noControlCharactersInRegex: control characters are what is looked for
  return /[\u0000-\u001f\u007f]/.test(text)
}

function whole(field: string, value: number, least: number, most: number): number {
  if (Number.isInteger(value) && value >= least && value <= most) return value
  throw invalid(field, `It must be a whole number from ${least} to ${most}`)
}

/** Without the value, which may be a secret in the wrong place. */
function invalid(field: string, rule: string): VarveError {
  return new VarveError('INVALID_CONFIG', `${field} of an FTP storage cannot be used. ${rule}.`, {
    context: { field },
  })
}
