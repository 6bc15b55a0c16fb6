import { isAbsolute } from 'node:path'
import { type CommandEvent, VarveError } from '@varve/core'

/** Options of {@link RcloneHelper}. */
export interface RcloneHelperOptions {
  /** The name of the remote, without a colon: one of rclone's own configuration, or one of `remotes`. */
  remoteName: string
  /**
   * Remotes that are given here and not in rclone's configuration, by their names: rclone's own options, such as
   * `{ base: { type: 'sftp', host: 'nas', user: 'backup', pass: '…' } }`. One of them may build on another, as
   * `crypt` does. Passwords are given as they are; the helper obscures them as rclone wants it. All of it
   * reaches rclone through its environment and never through its command line. Default: none.
   */
  remotes?: Readonly<Record<string, Readonly<Record<string, string>>>>
  /**
   * rclone's configuration file; absolute. Default: the one that rclone finds by `HOME` and `XDG_CONFIG_HOME`; none
   * where `remoteName` is one of `remotes`.
   */
  configFile?: string
  /**
   * Further variables of rclone's environment, such as `HTTPS_PROXY`, `SSH_AUTH_SOCK`, `RCLONE_CONFIG_PASS` for an
   * encrypted configuration, or any option of rclone as `RCLONE_…`. From this process it has `PATH`, `HOME` and
   * `XDG_CONFIG_HOME` alone, since others change what it does without anybody meaning it. Default: none.
   */
  env?: Readonly<Record<string, string>>
  /** The rclone program: a name that is looked for in `PATH`, or an absolute path. Default: `rclone`. */
  command?: string
  /**
   * How long rclone may make no progress, in milliseconds, before it is ended with `TIMEOUT`. Time that it spends
   * waiting for the source of an upload, or for who reads a download, does not count. Default: 60000.
   */
  timeoutMs?: number
  /** Is told of each rclone that has ended, with its arguments, its exit code and what it printed. No secrets. */
  onCommand?: (event: CommandEvent) => void
}

/** Options of {@link RcloneDriver}. */
export interface RcloneDriverOptions extends RcloneHelperOptions {
  /**
   * The folder within the remote that holds the backups, such as `bucket/backups`. On remotes that have such paths, one
   * that begins with `/` begins at the server's root, others where the login begins. Default: the remote's own root.
   */
  pathPrefix?: string
  /** Makes the folder, or the bucket, where it is missing. Default: false, since a missing one is mostly a mistake. */
  create?: boolean
}

/** Remotes of rclone's own configuration may have spaces and dots in their names. */
const CONFIGURED_NAME = /^[\w+@][\w+@. -]*$/u
/** Names that a variable of the environment can carry. */
const GIVEN_NAME = /^[A-Za-z][A-Za-z0-9_]*$/

/** @throws INVALID_CONFIG, which names the option */
export function assertHelperOptions(options: RcloneHelperOptions): void {
  const { remoteName, remotes = {}, configFile, env = {}, command, timeoutMs } = options
  if (!CONFIGURED_NAME.test(remoteName) || remoteName.endsWith(' ')) {
    throw invalid('remoteName', 'It is a name as `rclone listremotes` shows it, without the colon')
  }
  for (const [name, remote] of Object.entries(remotes)) {
    if (!GIVEN_NAME.test(name)) {
      throw invalid('remotes', 'A name in it has letters, digits and "_" only, and begins with a letter')
    }
    if (!remote.type) throw invalid(`remotes.${name}`, 'It has no "type", such as "s3" or "sftp"')
  }
  if (configFile !== undefined && (!isAbsolute(configFile) || configFile.includes('\0'))) {
    throw invalid('configFile', 'It must be an absolute path')
  }
  if (Object.keys(env).some(name => !/^[A-Za-z_][A-Za-z0-9_]*$/.test(name))) {
    throw invalid('env', 'A name in it has letters, digits and "_" only, and does not begin with a digit')
  }
  if (command === '' || command?.includes('\0')) {
    throw invalid('command', 'It must be the name or the path of the rclone program')
  }
  if (timeoutMs !== undefined && !(Number.isFinite(timeoutMs) && timeoutMs > 0)) {
    throw invalid('timeoutMs', 'It must be a number of milliseconds above 0')
  }
}

/** The path prefix without a slash at its end. @throws INVALID_CONFIG */
export function checkedPathPrefix(pathPrefix: string): string {
  const path = pathPrefix === '/' ? '/' : pathPrefix.replace(/\/$/, '')
  const names = path.replace(/^\//, '').split('/')
  // biome-ignore lint/suspicious/noControlCharactersInRegex: control characters are what is refused
  const odd = /[\u0000-\u001f\u007f]/.test(path) || !path.isWellFormed()
  if (odd || (names.length > 1 && names.includes('')) || names.includes('.') || names.includes('..')) {
    throw invalid('pathPrefix', 'It must be a plain path such as bucket/backups, with no "..", "." or "//"')
  }
  return path
}

/** Without the value: a secret may have been put in the wrong place. */
function invalid(field: string, rule: string): VarveError {
  return new VarveError('INVALID_CONFIG', `${field} of an rclone storage is not valid. ${rule}.`, {
    context: { field },
  })
}
