import type { StorageHealth } from '@varve/core'
import type { Command } from 'commander'
import { EXIT } from '../exit-code.ts'
import type { Session } from '../session.ts'
import { formatSize } from '../size-text.ts'
import { formatDuration } from '../time-text.ts'

/** `varve storage` */
export function storageCommand(program: Command, session: Session): void {
  const storage = program
    .command('storage')
    .summary('look at the storages of the configuration')
    .description('Looks at the storages of the configuration.')
  storage
    .command('check')
    .summary('try a storage')
    .description('Writes a small object to a storage, reads it back, lists and deletes it.')
    .argument('[name]', 'storage of the configuration (not needed when there is one)')
    .addHelpText('after', '\nExample:\n  varve storage check nas')
    .action((name: string | undefined) => check(session, name))
}

async function check(session: Session, name: string | undefined): Promise<void> {
  await using storage = await session.openStorage(name)
  const health = await storage.check(session.call())
  if (!health.ok) session.exitCode = EXIT.failed
  const { type, location } = storage
  await session.result({ type, location, ...health }, healthText(`${type} ${location}`, health))
}

/** The outcome of `varve storage check`. */
export function healthText(
  what: string,
  { ok, checks, freeBytes, notice, durationMs }: StorageHealth,
): string {
  const lines = checks.map(
    ({ name, ok, message }) => `  ${name.padEnd(8)} ${ok ? 'ok' : `FAILED: ${message ?? ''}`}`,
  )
  if (freeBytes !== undefined) lines.push(`  ${formatSize(freeBytes)} free`)
  if (notice !== undefined) lines.push(`  ${notice}`)
  const outcome = ok ? 'works' : 'does not work'
  return [`The storage ${what} ${outcome} (${formatDuration(durationMs / 1000)}).`, ...lines].join('\n')
}
