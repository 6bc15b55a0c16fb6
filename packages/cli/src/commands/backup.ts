import {
  type BackupManifest,
  BackupPipeline,
  type BackupRequest,
  type Host,
  type ImageDisk,
  ImageHost,
  LibvirtHost,
} from '@varve/core'
import { type Command, Option } from 'commander'
import { backupSummary } from '../manifest-text.ts'
import {
  diskPathOption,
  libvirtUriOption,
  numberOption,
  parseDiskNames,
  sizeOption,
  stateDirOption,
  storageOption,
  usageError,
} from '../options.ts'
import type { Session } from '../session.ts'

interface BackupOptions {
  type: 'auto' | 'full' | 'incremental'
  disk?: Record<string, string>
  disks?: 'all' | 'primary' | string[]
  freeze: 'off' | 'try' | 'require'
  maxChain?: number
  bandwidth?: number
  concurrency?: number
  clusterSize?: number
  rbdSnapshots?: number
  overlayFolder?: string
  overlayReserve?: number
  verifyUpload?: boolean
  storage?: string
  stateDir?: string
  libvirtUri?: string
}

/** `varve backup` */
export function backupCommand(program: Command, session: Session): void {
  program
    .command('backup')
    .summary('back up an instance')
    .description('Backs up a libvirt domain, running or stopped, or plain disk images.')
    .argument('<instance>', 'libvirt domain; with --disk, the name that the images are kept under')
    .addOption(
      new Option('--type <type>', 'auto: incremental where there is a backup to build on')
        .choices(['auto', 'full', 'incremental'])
        .default('auto'),
    )
    .addOption(
      new Option('--disks <list>', 'all, primary, or names such as vda,vdb (default: all)').argParser(text =>
        text === 'all' || text === 'primary' ? text : parseDiskNames(text),
      ),
    )
    .addOption(
      diskPathOption(
        '--disk <name=path>',
        'disk image, without libvirt; may be repeated; append ",format=qcow2" or ",format=raw" to state what it is; rbd:<pool>/<image> is an RBD image',
      ),
    )
    .addOption(
      new Option('--freeze <mode>', 'have the guest agent freeze file systems for the moment of the snapshot')
        .choices(['off', 'try', 'require'])
        .default('off'),
    )
    .addOption(numberOption('--max-chain <n>', 'increments before a new full backup (default: 30)', 0))
    .addOption(sizeOption('--bandwidth <size>', 'bytes a second for all disks together, such as 50M'))
    .addOption(numberOption('--concurrency <n>', 'disks that are read at the same time (default: 2)', 1))
    .addOption(sizeOption('--cluster-size <size>', 'cluster size of the images, 4K to 2M (default: 64K)'))
    .addOption(
      numberOption('--rbd-snapshots <n>', 'snapshots that stay on each RBD image afterwards (default: 2)', 1),
    )
    .option(
      '--overlay-folder <folder>',
      'where a running domain writes meanwhile (default: beside each disk; block devices need it)',
    )
    .addOption(
      sizeOption(
        '--overlay-reserve <size>',
        'gives up before a running domain leaves less free (default: 1G, or 5 % of a small file system)',
      ),
    )
    .option('--verify-upload', 'read everything back from the storage before the backup counts')
    .addOption(storageOption())
    .addOption(stateDirOption())
    .addOption(libvirtUriOption())
    .addHelpText(
      'after',
      `
Examples:
  varve backup web-1
  varve backup web-1 --type full --disks vda,vdb --bandwidth 50M
  varve backup web-1 --disk vda=/srv/web-1.qcow2
  varve backup web-1 --disk vda=rbd:vms/web-1`,
    )
    .action((instance: string, options: BackupOptions) => backup(session, instance, options))
}

async function backup(session: Session, instance: string, options: BackupOptions): Promise<void> {
  const { type, freeze, disks, maxChain, bandwidth, concurrency, clusterSize, rbdSnapshots, overlayReserve } =
    options
  if (options.disk) refuseDomainOptions(options)
  await using storage = await session.openStorage(options.storage)
  const request: BackupRequest = {
    instance,
    type,
    freeze,
    ...(disks !== undefined && { disks }),
    ...(maxChain !== undefined && { maxIncrementalChain: maxChain }),
    ...(bandwidth !== undefined && { bandwidth }),
    ...(concurrency !== undefined && { concurrency }),
    ...(clusterSize !== undefined && { clusterSize }),
    ...(rbdSnapshots !== undefined && { rbdSnapshots }),
    ...(overlayReserve !== undefined && { overlayReserve }),
    verifyUpload: options.verifyUpload ? 'digest' : 'size',
  }
  const host = await backupHost(session, instance, options)
  const stateDir = await session.stateDir(options.stateDir)
  const pipeline = new BackupPipeline({ host, storage, stateDir })
  const manifest: BackupManifest = await pipeline.run(request, session.run())
  await session.result(manifest, backupSummary(manifest))
}

/** Images do not run: what is only for a running domain would have no effect. */
function refuseDomainOptions({ freeze, overlayFolder, overlayReserve, libvirtUri }: BackupOptions): void {
  const given = {
    '--freeze': freeze === 'off' ? undefined : freeze,
    '--overlay-folder': overlayFolder,
    '--overlay-reserve': overlayReserve,
    '--libvirt-uri': libvirtUri,
  }
  for (const [name, value] of Object.entries(given))
    if (value !== undefined)
      throw usageError(
        `${name} does not go with --disk: it is for libvirt domains, and an image does not run.`,
      )
}

async function backupHost(session: Session, instance: string, options: BackupOptions): Promise<Host> {
  const rbd = await session.rbd()
  if (!options.disk) {
    const { overlayFolder } = options
    return new LibvirtHost({
      rbd,
      uri: await session.libvirtUri(options.libvirtUri),
      ...(overlayFolder !== undefined && { overlayFolder: session.path(overlayFolder) }),
    })
  }
  const disks: Record<string, ImageDisk> = {}
  for (const [name, text] of Object.entries(options.disk)) disks[name] = imageDisk(session, text)
  return new ImageHost({ instance, disks, rbd })
}

function imageDisk(session: Session, text: string): ImageDisk {
  const [, path, format] = /^(.+),format=(qcow2|raw)$/s.exec(text) ?? []
  if (path === undefined) return session.path(text)
  return { path: session.path(path), format: format === 'raw' ? 'raw' : 'qcow2' }
}
