import { type ErrorCode, VarveError } from '@varve/core'
import type { RcloneExit } from './rclone-process.ts'

/**
 * What `TMPDIR` is for rclone. Nothing can be made there, so a backend that would spool an upload to the machine's own
 * disk fails, and says so by this name.
 */
export const NO_TEMPORARY_FOLDER = '/dev/null/no-local-staging'

/** What failed, for {@link rcloneError}. */
export interface FailedCommand {
  /** Where: `remote:path`. */
  target: string
  /** The code where nothing more is known. Default: `STORAGE_FAILED`. */
  code?: ErrorCode
}

/** What rclone's words mean. The first that matches counts. */
const MEANINGS: readonly {
  words: RegExp
  code: ErrorCode
  remedy: string
  retryable?: boolean
}[] = [
  {
    words: new RegExp(NO_TEMPORARY_FOLDER),
    code: 'STORAGE_FAILED',
    remedy:
      'rclone would have spooled the data to a local disk for this remote, which Varve does not allow. Upload with a known size, or choose another backend',
  },
  {
    words: /didn't find section in config file|not found in config file/i,
    code: 'INVALID_CONFIG',
    remedy: 'Check remoteName and configFile: `rclone listremotes` shows the remotes that there are',
  },
  {
    words:
      /didn't find backend called|unable to decrypt configuration|failed to load config file|configuration is encrypted/i,
    code: 'INVALID_CONFIG',
    remedy:
      "Check rclone's configuration. The password of an encrypted one is given as RCLONE_CONFIG_PASS in env",
  },
  {
    words:
      /no space left|disk full|disk quota|quota ?exceeded|remaining disk space|(insufficient|exceeded) ?storage|not enough (free )?space|storage limit/i,
    code: 'STORAGE_FULL',
    remedy: 'Delete or prune backups, or add space',
  },
  {
    words: /x509: |tls: |certificate /i,
    code: 'STORAGE_UNREACHABLE',
    remedy: "The TLS connection failed: check the server's certificate and its address",
  },
  {
    words: /knownhosts|host key|key mismatch/i,
    code: 'STORAGE_ACCESS_DENIED',
    remedy: "The server's host key is not the known one: check that it is the right server",
  },
  {
    words:
      /access ?denied|permission denied|operation not permitted|read-only file system|unauthori[sz]ed|forbidden|status code: 40[13]|invalid ?access ?key|signature ?does ?not ?match|unable to authenticate|authentication (failed|error)|login incorrect|not logged in|invalid_grant|expired ?token|couldn't connect to ssh-agent/i,
    code: 'STORAGE_ACCESS_DENIED',
    remedy: "Check the remote's credentials, and that they may list, write and delete there",
  },
  {
    words: /no such bucket|nosuchbucket|bucket (was )?not found|bucket doesn't exist|container not found/i,
    code: 'STORAGE_NOT_FOUND',
    remedy: 'Make the bucket, or correct pathPrefix',
  },
  {
    words: /no such host|server misbehaving/i,
    code: 'STORAGE_UNREACHABLE',
    remedy: "The server's name is not known: check it, and the name service",
    retryable: true,
  },
  {
    words: /connection refused/i,
    code: 'STORAGE_UNREACHABLE',
    remedy: 'The server takes no connections: check its address and port, and that it is up',
    retryable: true,
  },
  {
    words:
      /i\/o timeout|timed? ?out|deadline exceeded|no route to host|network is unreachable|connection reset|broken pipe|connection lost|unexpected eof|handshake failed|: eof\b|use of closed network connection|closed network|connection (was )?closed/i,
    code: 'STORAGE_UNREACHABLE',
    remedy: 'Check the network and the server',
    retryable: true,
  },
]

/** rclone's exit code of an error that may go away (rclone.org/docs, "Exit code"). */
const TEMPORARY = 5

/** An rclone that failed as an error that says what it was about, what it printed and what to do. */
export function rcloneError(
  exit: RcloneExit,
  { target, code = 'STORAGE_FAILED' }: FailedCommand,
): VarveError {
  const command = exit.args[0] ?? ''
  const context = { command: 'rclone', args: exit.args, exitCode: exit.exitCode, stderr: exit.stderr }
  if (exit.startError === 'ENOENT') {
    return new VarveError(
      'COMMAND_MISSING',
      'The program rclone is not installed. Install it (Debian package rclone), or give its path as command, and try again.',
      { context },
    )
  }
  const said = lastWords(exit)
  const failed = command === 'rcat' ? 'failed to upload' : 'failed for'
  const what = `rclone ${command}: ${failed} ${target}: ${said}`
  const words = withoutPath(exit.unredacted, target) // a secret may be a word of a message
  const meaning = MEANINGS.find(meaning => meaning.words.test(words))
  const retryable = meaning?.retryable ?? exit.exitCode === TEMPORARY
  const remedy = meaning?.remedy ?? 'Check the remote: `rclone lsd` of it should work'
  return new VarveError(meaning?.code ?? code, `${what}. ${remedy}.`, { context, retryable })
}

/** Whether rclone says that the object, or the folder, is not there. Its exit codes are 3 and 4, but not of each command. */
export function saysMissing({ exitCode, unredacted }: RcloneExit): boolean {
  if (exitCode === 0) return false
  return exitCode === 3 || exitCode === 4 || / is a directory or doesn't exist$/m.test(unredacted)
}

/** Whether rclone says of a folder below the one that was listed that it could not be. */
export function saysPartial({ unredacted }: RcloneExit): boolean {
  return / ERROR : (?!: error listing: ).*: error listing: /m.test(unredacted)
}

/** Whether rclone says that the backend has no such command. */
export function saysNoCommand({ exitCode, unredacted }: RcloneExit): boolean {
  return exitCode !== 0 && /: command not found$|does not support backend commands$/m.test(unredacted)
}

/** A path may be called anything, and means nothing. */
function withoutPath(text: string, target: string): string {
  const path = target.slice(target.indexOf(':') + 1)
  const parts = [path, path.slice(0, path.lastIndexOf('/')), path.slice(path.lastIndexOf('/') + 1)]
  return parts
    .filter(part => part !== '')
    .map(part => part.replace(/[\\^$.*+?()[\]{}|/]/g, '\\$&'))
    .reduce(
      (rest, part) => rest.replace(new RegExp(`(?<![\\p{L}\\p{N}])${part}(?![\\p{L}\\p{N}])`, 'gu'), '…'),
      text,
    )
}

/** What rclone said at last, without the time: its last message, which may go on over several lines. */
function lastWords({ exitCode, stderr, startError }: RcloneExit): string {
  if (startError !== undefined && exitCode === undefined) return `it could not be started (${startError})`
  const messages = stderr.split(/^\d{4}\/\d\d\/\d\d \d\d:\d\d:\d\d /m).filter(text => text.trim() !== '')
  const last = messages.at(-1)?.replace(/^Failed to [\w ]+?( with \d+ errors: last error was)?: /, '')
  const text = last?.replace(/\s+/g, ' ').trim().replace(/\.$/, '')
  return (
    text || `it ended with ${exitCode === undefined ? 'a signal' : `exit code ${exitCode}`} and no message`
  )
}
