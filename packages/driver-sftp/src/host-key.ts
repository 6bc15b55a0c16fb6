import { createHash } from 'node:crypto'

/** What a rule makes of a host key: accepted, or why not. */
export type HostKeyVerdict = 'accepted' | { readonly refused: string }

/** Which host keys of a server are accepted. */
export interface HostKeyRule {
  /**
   * Gets the rule ready for one connection.
   *
   * @returns what judges a key, and the types of key to ask the server for first
   */
  load(): Promise<{ judge: (key: Buffer) => HostKeyVerdict; types: readonly string[] }>
}

/** The fingerprint of a host key, as OpenSSH shows it. */
export function fingerprintOf(key: Buffer): string {
  return `SHA256:${createHash('sha256').update(key).digest('base64').replace(/=+$/, '')}`
}

/** The type of a host key, such as `ssh-ed25519`: the first string of its blob (RFC 4253, section 6.6). */
export function keyTypeOf(key: Buffer): string {
  return key.byteLength < 4 ? '' : key.toString('latin1', 4, 4 + key.readUInt32BE(0))
}

/** Accepts the keys of these fingerprints. */
export function pinnedHostKeys(fingerprints: readonly string[]): HostKeyRule {
  const accepted = new Set(fingerprints.map(text => text.replace(/=$/, '')))
  const judge = (key: Buffer): HostKeyVerdict =>
    accepted.has(fingerprintOf(key)) ? 'accepted' : { refused: `expected is ${[...accepted].join(' or ')}` }
  return { load: async () => ({ judge, types: [] }) }
}
