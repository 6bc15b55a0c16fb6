import type { RbdSource } from './domain-xml.ts'
import { VarveError } from './errors.ts'
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
  return (await virsh.run({ ...run, secretOutput: true }, 'secret-get-value', secret)).trim()
}

async function secretOfUsage(virsh: Virsh, usage: string, run: RunOptions): Promise<string> {
  const lines = (await virsh.run(run, 'secret-list')).split('\n')
  const found = lines.map(line => line.trim().split(/\s+/)).find(words => words.slice(2).join(' ') === usage)
  if (found?.[0]) return found[0]
  throw new VarveError(
    'DISK_UNSUPPORTED',
    `libvirt has no secret of the usage ${usage}, with which a disk reaches its Ceph cluster. Define it (virsh secret-define, secret-set-value).`,
    { context: { usage } },
  )
}
