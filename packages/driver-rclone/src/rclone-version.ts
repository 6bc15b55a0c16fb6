import { VarveError } from '@varve/core'

/** The oldest rclone: the first whose `rcat` compares checksums by itself. */
export const OLDEST_VERSION = '1.59.0'

/** The version in what `rclone version` prints, such as `1.60.1`. Undefined where there is none. */
export function parseVersion(text: string): string | undefined {
  const [, major, minor, patch = '0'] = /^rclone v(\d+)\.(\d+)(?:\.(\d+))?/m.exec(text) ?? []
  return major === undefined ? undefined : `${major}.${minor}.${patch}`
}

/**
 * Refuses an rclone that is too old.
 *
 * @throws INVALID_CONFIG with both versions
 */
export function assertVersion(version: string | undefined): asserts version is string {
  if (version !== undefined && compareVersions(version, OLDEST_VERSION) >= 0) return
  const found = version === undefined ? 'does not tell its version' : `is version ${version}`
  throw new VarveError(
    'INVALID_CONFIG',
    `The rclone that is installed ${found}; Varve needs ${OLDEST_VERSION} or a newer one. Install one, or give its path as command.`,
    { context: { version, oldest: OLDEST_VERSION } },
  )
}

function compareVersions(a: string, b: string): number {
  const [left, right] = [a, b].map(version => version.split('.').map(Number))
  for (const [index, number] of (left ?? []).entries()) {
    const difference = number - (right?.[index] ?? 0)
    if (difference !== 0) return difference
  }
  return 0
}
