import { createHmac } from 'node:crypto'
import { readFile } from 'node:fs/promises'
import { errorMessage, VarveError } from '@varve/core'
import type { HostKeyRule, HostKeyVerdict } from './host-key.ts'

/** A line of a known_hosts file that is about a host. */
export interface KnownHost {
  /** Whether the key is one that must not be trusted any more. */
  readonly revoked: boolean
  /** Such as `ssh-ed25519`. */
  readonly type: string
  /** The public key. */
  readonly key: Buffer
}

/**
 * The lines of a known_hosts file that are about a host; the format is that of sshd(8). Certificate authorities are left
 * out, and so is what cannot be read.
 */
export function knownHosts(content: string, host: string, port: number): KnownHost[] {
  const name = (port === 22 ? host : `[${host}]:${port}`).toLowerCase()
  return content.split('\n').flatMap(line => {
    const fields = line.trim().split(/\s+/)
    const marker = fields[0]?.startsWith('@') ? fields.shift() : undefined
    const [hosts, type, key] = fields
    if (marker === '@cert-authority' || !hosts || hosts.startsWith('#') || !type || !key) return []
    return matches(hosts, name)
      ? [{ revoked: marker === '@revoked', type, key: Buffer.from(key, 'base64') }]
      : []
  })
}

/** Accepts the keys that a known_hosts file has for a host. */
export function knownHostsRule(path: string, host: string, port: number): HostKeyRule {
  return {
    async load() {
      let content: string
      try {
        content = await readFile(path, 'utf8')
      } catch (error) {
        throw new VarveError(
          'STORAGE_ACCESS_DENIED',
          `The host key cannot be checked: ${errorMessage(error)}. Make the file, or correct knownHosts.`,
          { context: { path }, cause: error },
        )
      }
      const known = knownHosts(content, host, port)
      const judge = (key: Buffer): HostKeyVerdict => {
        const same = known.filter(line => line.key.equals(key))
        if (same.some(line => line.revoked)) return { refused: `it is marked as revoked in ${path}` }
        if (same.length > 0) return 'accepted'
        return { refused: known.length > 0 ? `${path} has another one` : `${path} has none for this host` }
      }
      return { judge, types: known.filter(line => !line.revoked).map(line => line.type) }
    },
  }
}

/** Whether a line's first field, a list of patterns or the hash of one name, is about a host. */
function matches(hosts: string, name: string): boolean {
  if (hosts.startsWith('|1|')) {
    const [, , salt = '', hash = ''] = hosts.split('|')
    return createHmac('sha1', Buffer.from(salt, 'base64')).update(name).digest('base64') === hash
  }
  let found = false
  for (const pattern of hosts.toLowerCase().split(',')) {
    const negated = pattern.startsWith('!')
    if (!globRegExp(negated ? pattern.slice(1) : pattern).test(name)) continue
    if (negated) return false
    found = true
  }
  return found
}

function globRegExp(pattern: string): RegExp {
  const source = pattern
    .replace(/[.+^${}()|[\]\\]/g, '\\$&')
    .replaceAll('*', '.*')
    .replaceAll('?', '.')
  return new RegExp(`^${source}$`)
}
