import { ChainManager, type PruneReport, type StoredBackup } from '@varve/core'
import type { Command } from 'commander'
import { storedSize } from '../manifest-text.ts'
import { libvirtUriOption, numberOption, stateDirOption, storageOption } from '../options.ts'
import type { Session } from '../session.ts'
import { formatSize } from '../size-text.ts'
import { renderTable } from '../table.ts'
import { formatAge, formatTime } from '../time-text.ts'

interface PruneOptions {
  keepLast?: number
  keepDaily?: number
  keepWeekly?: number
  keepMonthly?: number
  keepYearly?: number
  timeZone?: string
  garbageAge?: number
  dryRun?: boolean
  storage?: string
  libvirtUri?: string
  stateDir?: string
}

/** `varve prune` */
export function pruneCommand(program: Command, session: Session): void {
  program
    .command('prune')
    .summary('remove old backups by rules of what to keep')
    .description(
      'Removes the backups that no rule keeps. What a kept backup rests on is kept too; a chain with damage is left alone.',
    )
    .argument('[instance]', 'only this instance (default: every one on the storage, each by itself)')
    .addOption(numberOption('--keep-last <n>', 'keep the newest n', 0))
    .addOption(numberOption('--keep-daily <n>', 'keep the newest of each of n days', 0))
    .addOption(numberOption('--keep-weekly <n>', 'keep the newest of each of n weeks', 0))
    .addOption(numberOption('--keep-monthly <n>', 'keep the newest of each of n months', 0))
    .addOption(numberOption('--keep-yearly <n>', 'keep the newest of each of n years', 0))
    .option('--time-zone <name>', "where days begin, such as Europe/Vienna (default: this machine's)")
    .addOption(
      numberOption(
        '--garbage-age <hours>',
        'without a write, before what an unfinished backup has left is removed; above what a backup of another machine takes (default: 24)',
        1,
      ),
    )
    .option('--dry-run', 'only show what would be removed')
    .addOption(storageOption())
    .addOption(libvirtUriOption())
    .addOption(stateDirOption())
    .addHelpText('after', '\nExample:\n  varve prune web-1 --keep-last 7 --keep-weekly 4 --dry-run')
    .action((instance: string | undefined, options: PruneOptions) => prune(session, instance, options))
}

async function prune(session: Session, instance: string | undefined, options: PruneOptions): Promise<void> {
  const { dryRun = false, garbageAge, storage: name, libvirtUri, stateDir: folder, ...rules } = options
  await using storage = await session.openStorage(name)
  const host = await session.libvirtHost(libvirtUri)
  const stateDir = await session.stateDir(folder)
  const report = await new ChainManager({ storage, host, stateDir }).prune(
    {
      timeZone: Intl.DateTimeFormat().resolvedOptions().timeZone,
      ...rules,
      ...(instance !== undefined && { instance }),
      ...(garbageAge !== undefined && { garbageAgeMs: garbageAge * 60 * 60 * 1000 }),
    },
    { dryRun, ...session.run() },
  )
  await session.result(pruneDocument(report), pruneText(report, new Date()))
}

function pruneDocument(report: PruneReport): object {
  const { dryRun, kept, removed, damaged, garbage, unfinishedUploads } = report
  return {
    dryRun,
    kept: kept.map(({ backup, reasons }) => ({ backup: backup.manifest.id, folder: backup.folder, reasons })),
    removed: removed.map(({ manifest, folder }) => ({ backup: manifest.id, folder })),
    damaged: damaged.map(({ folder, error: { code, message } }) => ({ folder, code, message })),
    garbage,
    unfinishedUploads,
  }
}

/** What `varve prune` did, or would do. */
export function pruneText(report: PruneReport, now: Date): string {
  const { dryRun, kept, removed, damaged, garbage } = report
  const rows = [
    ...kept.map(({ backup, reasons }) => ({ backup, fate: `keep: ${reasons.join(', ')}` })),
    ...removed.map(backup => ({ backup, fate: dryRun ? 'REMOVE' : 'removed' })),
  ].sort((a, b) => (sortKey(a.backup) < sortKey(b.backup) ? -1 : 1))
  const parts: string[] = []
  if (rows.length > 0) {
    parts.push(
      renderTable(
        [
          { title: 'BACKUP' },
          { title: 'INSTANCE' },
          { title: 'KIND' },
          { title: 'STATE OF' },
          { title: 'AGE', align: 'right' },
          { title: 'STORED', align: 'right' },
          { title: '' },
        ],
        rows.map(({ backup: { manifest }, fate }) => {
          const frozen = new Date(manifest.frozenAt)
          const { id, instance, kind } = manifest
          return [
            id,
            instance.name,
            kind,
            formatTime(frozen),
            formatAge(frozen, now),
            formatSize(storedSize(manifest)),
            fate,
          ]
        }),
      ),
    )
  }
  if (damaged.length > 0) {
    const lines = damaged.map(({ folder, error }) => `  ${folder}: ${error.message}`)
    parts.push(['Damaged, so the whole chain is left alone:', ...lines].join('\n'))
  }
  if (garbage.length > 0) {
    const lines = garbage.map(({ folder, bytes }) => `  ${folder} (${formatSize(bytes)})`)
    parts.push([`Leftovers of unfinished backups ${dryRun ? 'to remove' : 'removed'}:`, ...lines].join('\n'))
  }
  const freed = [...removed.map(({ manifest }) => storedSize(manifest)), ...garbage.map(({ bytes }) => bytes)]
  const size = formatSize(freed.reduce((sum, size) => sum + size, 0))
  parts.push(
    dryRun
      ? `${count(removed.length)} would be removed and ${size} freed; ${count(kept.length)} would stay.`
      : `${count(removed.length)} removed and ${size} freed; ${count(kept.length)} stay.`,
  )
  return parts.join('\n\n')
}

function sortKey({ manifest }: StoredBackup): string {
  return `${manifest.instance.name}\0${manifest.id}`
}

function count(backups: number): string {
  return backups === 1 ? '1 backup' : `${backups} backups`
}
