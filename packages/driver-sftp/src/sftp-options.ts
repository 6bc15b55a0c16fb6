import { isAbsolute } from 'node:path'
import { VarveError } from '@varve/core'
import ssh2 from 'ssh2'
import { type HostKeyRule, pinnedHostKeys } from './host-key.ts'
import { knownHostsRule } from './known-hosts.ts'

/** Options of {@link SftpDriver}. At least one of `password`, `privateKey` and `agent` is needed. */
export interface SftpDriverOptions {
  /** The server's name or address. */
  host: string
  /** The server's port. Default: 22. */
  port?: number
  /** Who logs in. */
  username: string
  /** That user's password. It is also the answer where the server asks by keyboard-interactive. */
  password?: string
  /**
   * The folder that holds the backups, absolute or relative to the folder in which a login begins. Symbolic links in
   * this path are followed. Default: the folder in which a login begins.
   */
  pathPrefix?: string
  /** A private key in OpenSSH's, PEM or PuTTY format: the content of its file, not the path. */
  privateKey?: string
  /** What `privateKey` is encrypted with. */
  passphrase?: string
  /** The path of an ssh-agent's socket, such as the value of `SSH_AUTH_SOCK`. */
  agent?: string
  /**
   * The fingerprints of the host keys that are accepted, as `ssh-keygen -lf` shows them: `SHA256:…`. Default: none,
   * and without `knownHosts` either, the driver accepts the first key it sees, shows it in `check()`, and
   * refuses another one as long as it lives. Name the key: a backup is given to whoever answers.
   */
  hostKey?: string | readonly string[]
  /** The path of a `known_hosts` file that has to hold the host's key. Read anew for each connection. */
  knownHosts?: string
  /** Makes the folder of `pathPrefix` where it is missing. Default: false, since a missing folder is mostly a missing mount. */
  create?: boolean
  /** How long the server may leave a request without an answer, in milliseconds. Default: 30000. */
  timeoutMs?: number
  /**
   * How often in a row a broken connection is made anew before a call fails, with growing pauses of at most 10 s. An
   * upload that gets on begins to count anew. Default: 6.
   */
  retries?: number
}

/** The options, checked and with their defaults. */
export interface SftpSettings {
  readonly host: string
  readonly port: number
  readonly username: string
  readonly login: {
    readonly password?: string
    readonly privateKey?: string
    readonly passphrase?: string
    readonly agent?: string
  }
  readonly pathPrefix: string
  readonly create: boolean
  readonly timeoutMs: number
  readonly retries: number
  /** Which host keys are accepted; undefined where any is. */
  readonly hostKeyRule: HostKeyRule | undefined
}

/** @throws INVALID_CONFIG, which names the option and never a secret */
export function sftpSettings(options: SftpDriverOptions): SftpSettings {
  const { host, port = 22, username, password, pathPrefix = '', privateKey, passphrase, agent } = options
  const { hostKey, knownHosts, create = false, timeoutMs = 30_000, retries = 6 } = options
  if (!/^[^\s/@]+$/.test(host))
    throw invalid('host', 'It must be a name or an address, such as backup.example')
  if (!Number.isInteger(port) || port < 1 || port > 65_535) throw invalid('port', 'It must be 1 to 65535')
  if (username === '' || username.includes('\0')) throw invalid('username', 'It must not be empty')
  if (pathPrefix.includes('\0')) throw invalid('pathPrefix', 'It must be the path of a folder')
  if (!password && privateKey === undefined && agent === undefined) {
    throw invalid('password', 'Give a password, a privateKey or an agent')
  }
  if (privateKey !== undefined) assertPrivateKey(privateKey, passphrase)
  else if (passphrase !== undefined)
    throw invalid('passphrase', 'It belongs to a privateKey, and there is none')
  if (!Number.isInteger(timeoutMs) || timeoutMs < 100 || timeoutMs > 3_600_000) {
    throw invalid('timeoutMs', 'It must be 100 to 3600000 milliseconds')
  }
  if (!Number.isInteger(retries) || retries < 0 || retries > 1000)
    throw invalid('retries', 'It must be 0 to 1000')
  if (hostKey !== undefined && knownHosts !== undefined) {
    throw invalid('knownHosts', 'Give either hostKey or knownHosts')
  }
  if (knownHosts !== undefined && !isAbsolute(knownHosts)) {
    throw invalid('knownHosts', 'It must be the absolute path of a known_hosts file')
  }
  return {
    host,
    port,
    username,
    login: {
      ...(password && { password }),
      ...(privateKey !== undefined && { privateKey }),
      ...(passphrase !== undefined && { passphrase }),
      ...(agent !== undefined && { agent }),
    },
    pathPrefix,
    create,
    timeoutMs,
    retries,
    hostKeyRule: hostKeyRule(host, port, hostKey, knownHosts),
  }
}

function hostKeyRule(
  host: string,
  port: number,
  hostKey: string | readonly string[] | undefined,
  knownHosts: string | undefined,
): HostKeyRule | undefined {
  if (knownHosts !== undefined) return knownHostsRule(knownHosts, host, port)
  if (hostKey === undefined) return undefined
  const fingerprints = typeof hostKey === 'string' ? [hostKey] : hostKey
  // 32 bytes are 43 characters of base64, which ssh-keygen shows without the "=" at their end
  if (fingerprints.length === 0 || !fingerprints.every(text => /^SHA256:[A-Za-z0-9+/]{43}=?$/.test(text))) {
    throw invalid('hostKey', 'It must be a fingerprint as ssh-keygen -lf shows it: SHA256: and 43 characters')
  }
  return pinnedHostKeys(fingerprints)
}

function assertPrivateKey(privateKey: string, passphrase: string | undefined): void {
  const parsed = ssh2.utils.parseKey(privateKey, passphrase)
  if (parsed instanceof Error) {
    // the parser's own message may quote the key
    const encrypted = /encrypt|passphrase|decrypt/i.test(parsed.message)
    throw encrypted
      ? invalid('passphrase', 'The privateKey is encrypted, and this does not decrypt it')
      : invalid('privateKey', "It must be the content of a private key's file, not its path")
  }
  const keys = Array.isArray(parsed) ? parsed : [parsed]
  if (!keys.some(key => key.isPrivateKey())) throw invalid('privateKey', 'It is a public key')
}

function invalid(field: string, rule: string): VarveError {
  return new VarveError('INVALID_CONFIG', `${field} of an SFTP storage cannot be used. ${rule}.`, {
    context: { field },
  })
}
