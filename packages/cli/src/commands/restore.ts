import {
  type BackupManifest,
  findBackup,
  type Host,
  type RestoreDestination,
  RestorePipeline,
  type RestoreRequest,
  type RestoreResult,
  type StorageDriver,
  type StoredBackup,
} from '@varve/core'
import { type Command, Option } from 'commander'
import { confirm } from '../confirm.ts'
import {
  diskPathOption,
  libvirtUriOption,
  numberOption,
  parseDiskNames,
  stateDirOption,
  storageOption,
  usageError,
} from '../options.ts'
import type { Session } from '../session.ts'
import { formatSize } from '../size-text.ts'
import { renderTable } from '../table.ts'
import { formatAge, formatDuration, formatTime } from '../time-text.ts'

interface RestoreOptions {
  toDisk?: Record<string, string>
  toInstance?: string
  toNewInstance?: string
  directory?: string
  rbdPool?: string
  disks?: string[]
  format?: 'qcow2' | 'raw'
  overwrite?: boolean
  inPlace?: boolean
  withDefinition?: boolean
  start: boolean
  shutdownTimeout?: number
  yes?: boolean
  storage?: string
  stateDir?: string
  libvirtUri?: string
}

/** `varve restore` */
export function restoreCommand(program: Command, session: Session): void {
  program
    .command('restore')
    .summary('restore a backup to files, to its instance or to a new one')
    .description(
      'Restores a backup: to new image files (--to-disk), over the disks of an instance (--to-instance), or as a new instance (--to-new-instance).',
    )
    .argument('<backup>', 'id of the backup; "varve list" shows them')
    .addOption(
      diskPathOption(
        '--to-disk <name=path>',
        'write this disk to a file, or to the RBD image rbd:<pool>/<image>; may be repeated',
      ),
    )
    .option('--to-instance <name>', 'replace the disks of this libvirt domain; it is shut down for it')
    .option('--to-new-instance <name>', 'define a new libvirt domain from the backup')
    .option('--directory <folder>', 'folder for the disks of a new instance')
    .option(
      '--rbd-pool <pool>',
      'pool, or pool/namespace, for those that were RBD images (default: the folder)',
    )
    .addOption(
      new Option('--disks <list>', 'only these disks, such as vda,vdb (default: all)').argParser(
        parseDiskNames,
      ),
    )
    .addOption(
      new Option(
        '--format <format>',
        'format of new files (default: qcow2), or with --in-place of the target',
      ).choices(['qcow2', 'raw']),
    )
    .option('--overwrite', 'replace files that --to-disk names and that exist')
    .option(
      '--in-place',
      'write over the target itself, as block devices need; a failure while it writes leaves it incomplete',
    )
    .option('--with-definition', "put the instance's definition and UEFI variables back as well")
    .option('--no-start', 'leave the instance switched off afterwards')
    .addOption(
      numberOption('--shutdown-timeout <seconds>', 'then the guest is switched off hard (default: 60)', 1),
    )
    .option('-y, --yes', 'do not ask before the disks of an instance are replaced')
    .addOption(storageOption())
    .addOption(stateDirOption())
    .addOption(libvirtUriOption())
    .addHelpText(
      'after',
      `
Examples:
  varve restore 20261123-231543-123-9f3a1c --to-disk vda=restored.qcow2
  varve restore 20261123-231543-123-9f3a1c --to-instance web-1
  varve restore 20261123-231543-123-9f3a1c --to-new-instance web-1-copy --directory /srv/images`,
    )
    .action((backup: string, options: RestoreOptions) => restore(session, backup, options))
}

async function restore(session: Session, backup: string, options: RestoreOptions): Promise<void> {
  const to = destination(session, options)
  const { disks, inPlace, shutdownTimeout, withDefinition } = options
  await using storage = await session.openStorage(options.storage)
  const host = await session.libvirtHost(options.libvirtUri)
  const stateDir = await session.stateDir(options.stateDir)
  if ('instance' in to && !options.yes)
    await confirmReplacement(session, { storage, host, backup, instance: to.instance }, options)
  const request: RestoreRequest = {
    backup,
    to,
    ...(disks && { disks }),
    ...(inPlace && { inPlace }),
    ...(!options.start && { start: false }),
    ...(shutdownTimeout !== undefined && { powerOffTimeoutMs: shutdownTimeout * 1000 }),
    ...(withDefinition && { definition: 'restore' }),
  }
  const startedAt = performance.now()
  const result = await new RestorePipeline({ host, storage, stateDir }).run(request, session.run())
  await session.result(result, restoreSummary(result, (performance.now() - startedAt) / 1000))
}

function destination(session: Session, options: RestoreOptions): RestoreDestination {
  const { toDisk, toInstance, toNewInstance, directory, rbdPool, format, overwrite } = options
  const chosen = [toDisk, toInstance, toNewInstance].filter(target => target !== undefined)
  if (chosen.length !== 1)
    throw usageError(
      'Say where to restore to: exactly one of --to-disk, --to-instance and --to-new-instance.',
    )
  if (overwrite && !toDisk) throw usageError('--overwrite goes with --to-disk only.')
  if (directory !== undefined && toNewInstance === undefined)
    throw usageError('--directory goes with --to-new-instance only.')
  if (rbdPool !== undefined && toNewInstance === undefined)
    throw usageError('--rbd-pool goes with --to-new-instance only.')
  if (options.withDefinition && toInstance === undefined)
    throw usageError(
      '--with-definition goes with --to-instance only; a new instance always gets its definition.',
    )
  if (!options.start && toDisk) throw usageError('--no-start does not go with --to-disk: nothing is started.')
  if (options.shutdownTimeout !== undefined && toInstance === undefined)
    throw usageError('--shutdown-timeout goes with --to-instance only: nothing else is switched off.')
  if (toInstance !== undefined) {
    if (format) throw usageError('--format does not go with --to-instance: its disks keep their format.')
    return { instance: toInstance }
  }
  if (toNewInstance !== undefined) {
    if (options.inPlace) throw usageError('--in-place does not go with --to-new-instance: its disks are new.')
    if (directory === undefined)
      throw usageError('--to-new-instance needs --directory, the folder for its disks.')
    return {
      newInstance: toNewInstance,
      directory: session.path(directory),
      ...(format && { format }),
      ...(rbdPool !== undefined && { rbdPool }),
    }
  }
  const disks = Object.fromEntries(
    Object.entries(toDisk ?? {}).map(([name, path]) => [name, session.path(path)]),
  )
  return { disks, ...(format && { format }), ...(overwrite && { overwrite }) }
}

async function confirmReplacement(
  session: Session,
  {
    storage,
    host,
    backup,
    instance,
  }: { storage: StorageDriver; host: Host; backup: string; instance: string },
  { disks, inPlace, withDefinition }: RestoreOptions,
): Promise<void> {
  const { manifest }: StoredBackup = await findBackup(storage, backup, session.call())
  const frozen = new Date(manifest.frozenAt)
  const isSameName = manifest.instance.name === instance
  const of = isSameName ? '' : ` of ${manifest.instance.name}`
  const other = isSameName ? await otherUuid(session, host, manifest) : ''
  const names = disks ?? manifest.disks.map(({ name }) => name)
  const what = `The ${names.length === 1 ? 'disk' : 'disks'} ${names.join(', ')} of ${instance}${withDefinition ? ' and its definition' : ''}`
  const how = inPlace ? 'overwritten in place with' : 'replaced by'
  const risk = inPlace ? ' A failure leaves the disks incomplete.' : ''
  await confirm(session, {
    text: `${what} will be ${how} the backup${of} from ${formatTime(frozen)} (${formatAge(frozen, new Date())} ago). If it runs, it is shut down for that.${risk}${other}`,
    answer: instance,
  })
}

/** What tells that the domain is not the one that was backed up. Why it cannot be looked at, the restore tells. */
async function otherUuid(
  session: Session,
  host: Host,
  { instance: { name, uuid } }: BackupManifest,
): Promise<string> {
  const now = await host.instance(name, session.run()).catch(() => undefined)
  if (!uuid || !now?.uuid || now.uuid === uuid) return ''
  return `\nThe backup is of another domain of this name, or ${name} was defined anew since: its UUID was ${uuid} and is ${now.uuid} by now.`
}

function restoreSummary({ backup, disks, instance, started }: RestoreResult, seconds: number): string {
  const to = instance === undefined ? '' : ` to ${instance}`
  const state = started ? ', which was started' : ''
  return [
    `Backup ${backup} is restored${to}${state}, in ${formatDuration(seconds)}.`,
    '',
    renderTable(
      [
        { title: 'DISK' },
        { title: 'FORMAT' },
        { title: 'SIZE', align: 'right' },
        { title: 'WRITTEN', align: 'right' },
        { title: 'PATH' },
      ],
      disks.map(disk => [
        disk.name,
        disk.format,
        formatSize(disk.virtualSize),
        formatSize(disk.bytesWritten),
        disk.path,
      ]),
    ),
  ].join('\n')
}
