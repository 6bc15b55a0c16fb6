import type { RbdSource } from './domain-xml.ts'
import { isVarveError, VarveError } from './errors.ts'
import type { RbdConnection } from './rbd.ts'
import type { RunOptions } from './run-options.ts'
import type { Virsh } from './virsh.ts'

/** How a domain's disk reaches its Ceph cluster, with the key that libvirt keeps as a secret. */
export async function rbdConnection(
  virsh: Virsh,
  { monitors, conf, auth }: RbdSource,
  run: RunOptions,
): Promise<RbdConnection> {
  const key = auth && (await readSecret(virsh, auth, run))
  return {
    ...(monitors.length > 0 && { monitors }),
    ...(conf !== undefined && { conf }),
    ...(auth && { user: auth.user }),
    ...(key !== undefined && { key }),
  }
}

/** Undefined where the disk has no secret, and Ceph's own keyring is used. */
async function readSecret(
  virsh: Virsh,
  { uuid, usage }: NonNullable<RbdSource['auth']>,
  run: RunOptions,
): Promise<string | undefined> {
  const secret = uuid ?? (usage && (await secretOfUsage(virsh, usage, run)))
  if (!secret) return undefined
  try {
    return (await virsh.run({ ...run, secretOutput: true }, 'secret-get-value', secret)).trim()
  } catch (error) {
    throw explained(error, secret)
  }
}

/** What virsh says of a secret whose value it does not give, and what that means. */
const REFUSALS: readonly (readonly [says: RegExp, message: string])[] = [
  [
    /is private/i,
    "is private: libvirt hands it to QEMU alone. Define it anew with private='no' (virsh secret-dumpxml, secret-undefine, secret-define with the same uuid) and set its value again (virsh secret-set-value).",
  ],
  [/does not have a value/i, 'has no value. Set it: virsh secret-set-value.'],
  [
    /secret not found|no secret with matching/i,
    'is not there. Define it (virsh secret-define, secret-set-value), or correct the disk (virsh edit).',
  ],
]

/** Why libvirt does not hand out a secret; other errors stay as they are. */
function explained(error: unknown, secret: string): unknown {
  const stderr = isVarveError(error, 'COMMAND_FAILED') ? String(error.context.stderr) : ''
  const message = REFUSALS.find(([says]) => says.test(stderr))?.[1]
  if (message === undefined) return error
  return new VarveError(
    'CEPH_ACCESS_DENIED',
    `libvirt's secret ${secret}, with which a disk reaches its Ceph cluster, ${message}`,
    { context: { secret }, cause: error },
  )
}

async function secretOfUsage(virsh: Virsh, usage: string, run: RunOptions): Promise<string> {
  const lines = (await virsh.run(run, 'secret-list')).split('\n')
  const rows = lines.map(line => line.trim().split(/\s+/))
  const found = rows.find(([, type, ...name]) => type === 'ceph' && name.join(' ') === usage)
  if (found?.[0]) return found[0]
  throw new VarveError(
    'CEPH_ACCESS_DENIED',
    `libvirt's secret of the usage ${usage}, with which a disk reaches its Ceph cluster, is not there. Define it (virsh secret-define, secret-set-value), or correct the disk (virsh edit).`,
    { context: { usage } },
  )
}
