import type { BackupManifest } from '@varve/core'
import { formatRate, formatSize } from './size-text.ts'
import { renderTable } from './table.ts'
import { formatDuration, formatTime } from './time-text.ts'

const CONSISTENCY: Record<BackupManifest['consistency'], string> = {
  crash: 'crash-consistent, as after a power cut',
  filesystem: 'file systems frozen by the guest agent',
  offline: 'the instance was stopped',
}

/** Bytes of all images of a backup. */
export function storedSize(manifest: BackupManifest): number {
  return manifest.disks.reduce((sum, { storedSize }) => sum + storedSize, 0)
}

/** How a backup that was just taken went. */
export function backupSummary(manifest: BackupManifest): string {
  const { id, instance, kind, consistency } = manifest
  const stored = storedSize(manifest)
  const seconds = (Date.parse(manifest.finishedAt) - Date.parse(manifest.startedAt)) / 1000
  const rate = seconds >= 1 ? ` (${formatRate(stored / seconds)})` : ''
  return [
    `Backup ${id} of ${instance.name} is complete.`,
    `${kind}; ${CONSISTENCY[consistency]}; ${formatSize(stored)} in ${formatDuration(seconds)}${rate}`,
    '',
    diskTable(manifest),
  ].join('\n')
}

/** The disks of a backup. */
export function diskTable({ disks }: BackupManifest): string {
  return renderTable(
    [
      { title: 'DISK' },
      { title: 'KIND' },
      { title: 'SIZE', align: 'right' },
      { title: 'STORED', align: 'right' },
      { title: 'SOURCE' },
    ],
    disks.map(disk => [
      disk.name,
      disk.fallback === undefined ? disk.kind : `${disk.kind} (${disk.fallback})`,
      formatSize(disk.virtualSize),
      formatSize(disk.storedSize),
      `${disk.source.path} (${disk.source.format})`,
    ]),
  )
}

/** Everything about a backup that a person wants to know. */
export function manifestText(manifest: BackupManifest, { folder, chain }: ManifestPlace): string {
  const { id, instance, kind, consistency, startedAt, frozenAt, finishedAt, definition, nvram, tools } =
    manifest
  const seconds = (Date.parse(finishedAt) - Date.parse(startedAt)) / 1000
  const files = [definition && `definition ${definition.key}`, nvram && `UEFI variables ${nvram.key}`]
  const fields: [string, string][] = [
    ['Backup', id],
    ['Instance', instance.uuid === undefined ? instance.name : `${instance.name} (${instance.uuid})`],
    ['State of', `${formatTime(new Date(frozenAt))} (${CONSISTENCY[consistency]})`],
    ['Kind', kind],
    ['Rests on', chain],
    ['Stored', `${formatSize(storedSize(manifest))} in ${formatDuration(seconds)}`],
    ['Folder', folder],
    ['Files', files.filter(file => file !== undefined).join(', ') || 'none beside the disks'],
    [
      'Made by',
      Object.entries(tools)
        .map(([name, version]) => `${name} ${version}`)
        .join(', '),
    ],
  ]
  const width = Math.max(...fields.map(([name]) => name.length))
  const lines = fields.map(([name, value]) => `${name.padEnd(width)}  ${value}`)
  return [...lines, '', diskTable(manifest)].join('\n')
}

/** Where a backup stands. */
export interface ManifestPlace {
  /** Its folder on the storage. */
  readonly folder: string
  /** What it rests on, in words. */
  readonly chain: string
}
