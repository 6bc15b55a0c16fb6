import { isAbsolute } from 'node:path'
import type { RbdConnector } from '@varve/core'
import { z } from 'zod'
import { type Secret, secretField } from './secret.ts'

/** How the Ceph cluster is reached; see `CephConnection` of `@varve/ceph`. */
export interface CephSettings {
  readonly conf?: string
  readonly user?: string
  readonly keyring?: string
  readonly key?: Secret
  readonly monitors?: readonly string[]
  readonly timeoutMs?: number
}

const path = z.string().refine(isAbsolute, 'must be an absolute path, such as /etc/ceph/ceph.conf')

/** The schema of {@link CephSettings}. */
export const cephSettings: z.ZodType<CephSettings> = z.strictObject({
  conf: path.exactOptional(),
  user: z.string().min(1, 'must not be empty').exactOptional(),
  keyring: path.exactOptional(),
  key: secretField.exactOptional(),
  monitors: z.array(z.string()).min(1, 'needs one at least').exactOptional(),
  timeoutMs: z.int().min(1000).exactOptional(),
})

/** What reaches RBD images. The package is loaded only here. */
export async function cephConnector(
  { key, ...settings }: CephSettings,
  readKey: (key: Secret) => Promise<string>,
): Promise<RbdConnector> {
  const { CephConnector } = await import('@varve/ceph')
  return new CephConnector({ ...settings, ...(key !== undefined && { key: await readKey(key) }) })
}
