import { constants } from 'node:os'
import { type ErrorCode, VarveError } from '@varve/core'

/** An `rbd` that failed. */
export interface FailedRbd {
  /** What was done, for messages, such as `rbd snap create`. */
  readonly label: string
  /** What it was done to: `<pool>/[<namespace>/]<image>`. */
  readonly image: string
  readonly snapshot?: string | undefined
  /** The image that may be in the way. Default: `image`. */
  readonly target?: string | undefined
  /** Undefined where a signal ended it. */
  readonly exitCode: number | undefined
  /** The signal, such as `SIGKILL`. */
  readonly endedBy?: string | undefined
  readonly stderr: string
  readonly cause?: unknown
}

/** What an exit code and words of `rbd` mean. */
interface Meaning {
  /** The exit codes, which are those of errno(3), though some failures exit with 1. Default: any. */
  readonly exitCodes?: readonly number[]
  readonly words?: RegExp
  readonly code: ErrorCode
  readonly says: (failed: { image: string; snapshot: string; target: string }) => string
  readonly retryable?: boolean
}

const { ENOENT, EPERM, EACCES, ETIMEDOUT, EBUSY, EROFS, EEXIST, ENOSPC, EDQUOT } = constants.errno

/** The first that matches counts. */
const MEANINGS: readonly Meaning[] = [
  {
    words: /unable to open config file|error reading config file|cannot identify monitors/,
    code: 'INVALID_CONFIG',
    says: () =>
      "Ceph's configuration cannot be used. Check that ceph.conf is there, is readable and names the monitors (mon_host), or give conf or monitors",
  },
  {
    exitCodes: [EPERM, EACCES],
    words: /Operation not permitted|Permission denied|handle_auth_bad_method/,
    code: 'CEPH_ACCESS_DENIED',
    says: ({ image }) =>
      `The Ceph cluster does not let this user do this with ${image}. Check the user, its key, and its rights: \`ceph auth get client.NAME\` should show "profile rbd" for mon and osd`,
  },
  {
    words: /failed to decode key/,
    code: 'CEPH_ACCESS_DENIED',
    says: () => "The user's key is not a cephx key. Check its keyring",
  },
  {
    exitCodes: [ETIMEDOUT],
    code: 'CEPH_UNREACHABLE',
    says: () =>
      'The Ceph cluster does not answer. Check the addresses of its monitors, the network, and `ceph status`',
    retryable: true,
  },
  {
    // librbd 16 may abort when many of its requests have timed out.
    words: /\(110\) Connection timed out/,
    code: 'CEPH_UNREACHABLE',
    says: () =>
      'The Ceph cluster does not answer any more. Check the addresses of its monitors, the network, and `ceph status`',
    retryable: true,
  },
  {
    words: /couldn't connect to the cluster/,
    code: 'CEPH_UNREACHABLE',
    says: () =>
      'The Ceph cluster cannot be reached. Check the addresses of its monitors, the network, and `ceph status`',
    retryable: true,
  },
  {
    exitCodes: [ENOENT],
    words: /error opening pool|namespace '.*' does not exist/,
    code: 'CEPH_POOL_NOT_FOUND',
    says: ({ image }) =>
      `The pool or the namespace of ${image} does not exist. \`ceph osd pool ls\` and \`rbd namespace ls POOL\` show those that there are`,
  },
  {
    exitCodes: [ENOENT],
    words: /snapshot context|remove snapshot|No such snapshot|export-diff error/,
    code: 'RBD_SNAPSHOT_NOT_FOUND',
    says: ({ image, snapshot }) =>
      `The RBD image ${image} has no snapshot ${snapshot}. \`rbd snap ls ${image}\` shows those that there are`,
  },
  {
    exitCodes: [ENOENT],
    words: /error opening image|rename error|delete error|error opening source image/,
    code: 'DISK_NOT_FOUND',
    says: ({ image }) => `There is no RBD image ${image}. Check its pool and its name: \`rbd ls POOL\``,
  },
  {
    exitCodes: [EBUSY],
    words: /protected/,
    code: 'RBD_SNAPSHOT_PROTECTED',
    says: ({ image, snapshot }) =>
      `The snapshot ${snapshot} of ${image} is protected, since clones rest on it or may. \`rbd children\` shows them; remove or flatten them and unprotect it (\`rbd snap unprotect\`)`,
  },
  {
    // EROFS: another client holds the image's exclusive lock
    exitCodes: [EBUSY, EROFS],
    code: 'DISK_BUSY',
    says: ({ image }) =>
      `The RBD image ${image} is in use. Stop the virtual machine that has it open, or unmap it; \`rbd status ${image}\` shows who it is. A client that died counts for 30 s more`,
    retryable: true,
  },
  {
    exitCodes: [EEXIST],
    code: 'TARGET_EXISTS',
    says: ({ target }) => `There is an RBD image ${target} already. Choose another name, or remove it`,
  },
  {
    exitCodes: [EDQUOT],
    words: /snap/i,
    code: 'TARGET_FULL',
    says: ({ image }) =>
      `${image} may have no more snapshots, or its pool no more data. Raise the limit (\`rbd snap limit set\`) or remove snapshots; \`ceph osd pool get-quota\` shows that of the pool`,
  },
  {
    exitCodes: [ENOSPC, EDQUOT],
    code: 'TARGET_FULL',
    says: ({ image }) =>
      `The pool of ${image} has no room. Add space, or raise its quota (\`ceph osd pool get-quota\`)`,
  },
]

/** An `rbd` that failed, as an error that tells what is wrong and what to do. */
export function rbdError(failed: FailedRbd): VarveError {
  const { label, image, snapshot, target = image, exitCode, endedBy, stderr, cause } = failed
  const context = { image, snapshot, command: label, exitCode, endedBy, stderr }
  const said = saidLine(stderr)
  const meaning = MEANINGS.find(
    ({ exitCodes, words }) =>
      (exitCodes === undefined || exitCodes.includes(exitCode ?? -1)) &&
      (words === undefined || words.test(stderr)),
  )
  if (!meaning) {
    const end = endedBy === undefined ? `exit ${exitCode ?? '?'}` : `ended by ${endedBy}`
    return new VarveError(
      'RBD_FAILED',
      `${label} of ${image} failed (${end}) and said: ${said}. See \`ceph health detail\`, then try again.`,
      { context, cause },
    )
  }
  const { code, says, retryable = false } = meaning
  return new VarveError(
    code,
    `${says({ image, snapshot: snapshot ?? '', target })}. ${label} said: ${said}`,
    {
      context,
      cause,
      retryable,
    },
  )
}

/** What rbd itself said: its own lines are without a time, unlike those of the libraries, and have the errno. */
function saidLine(stderr: string): string {
  const lines = stderr
    .split('\n')
    .map(line => line.trim())
    .filter(line => line !== '')
  const own = lines.filter(line => !/^\d{4}-\d\d-\d\dT/.test(line))
  return (own.at(-1) ?? lines.at(-1) ?? 'nothing').replace(/^Removing .*failed\./, '')
}
