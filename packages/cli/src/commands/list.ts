import { type BackupListing, ChainManager } from '@varve/core'
import type { Command } from 'commander'
import { storedSize } from '../manifest-text.ts'
import { storageOption } from '../options.ts'
import type { Session } from '../session.ts'
import { formatSize } from '../size-text.ts'
import { renderTable } from '../table.ts'
import { formatAge, formatTime } from '../time-text.ts'

/** `varve list` */
export function listCommand(program: Command, session: Session): void {
  program
    .command('list')
    .summary('list the backups of an instance, or all')
    .description('Lists backups, oldest first, and what is there but damaged.')
    .argument('[instance]', 'only those of this instance')
    .addOption(storageOption())
    .addHelpText('after', '\nExample:\n  varve list web-1')
    .action((instance: string | undefined, options: { storage?: string }) => list(session, instance, options))
}

async function list(
  session: Session,
  instance: string | undefined,
  options: { storage?: string },
): Promise<void> {
  await using storage = await session.openStorage(options.storage)
  const listing = await new ChainManager({ storage }).list({
    ...(instance !== undefined && { instance }),
    ...session.call(),
  })
  const document = {
    backups: listing.backups.map(({ manifest }) => manifest),
    damaged: listing.damaged.map(({ key, error: { code, message } }) => ({ key, code, message })),
  }
  const where = `${instance === undefined ? '' : ` of ${instance}`} on ${storage.location}`
  await session.result(document, listText(listing, where, new Date()))
}

/** The table of `varve list`. */
export function listText({ backups, damaged }: BackupListing, where: string, now: Date): string {
  const parts: string[] = []
  if (backups.length === 0) parts.push(`There are no backups${where}.`)
  else {
    parts.push(
      renderTable(
        [
          { title: 'BACKUP' },
          { title: 'INSTANCE' },
          { title: 'KIND' },
          { title: 'STATE OF' },
          { title: 'AGE', align: 'right' },
          { title: 'DISKS' },
          { title: 'STORED', align: 'right' },
          { title: 'PARENT' },
        ],
        backups.map(({ manifest }) => {
          const frozen = new Date(manifest.frozenAt)
          return [
            manifest.id,
            manifest.instance.name,
            manifest.kind,
            formatTime(frozen),
            formatAge(frozen, now),
            manifest.disks.map(({ name }) => name).join(','),
            formatSize(storedSize(manifest)),
            manifest.parent ?? '',
          ]
        }),
      ),
    )
  }
  if (damaged.length > 0) {
    const lines = damaged.map(({ key, error }) => `  ${key}: ${error.message}`)
    parts.push(['Damaged, and not usable:', ...lines].join('\n'))
  }
  return parts.join('\n\n')
}
