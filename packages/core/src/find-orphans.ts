import { backupTime, isBackupId } from './backup-id.ts'
import { backupOfMark } from './backup-plan.ts'
import { type Catalog, readCatalog } from './backups.ts'
import { type ErrorCode, isVarveError } from './errors.ts'
import { DEFAULT_GARBAGE_AGE_MS } from './garbage.ts'
import type { Host } from './host.ts'
import { RunJournal } from './journal.ts'
import type { BackupManifest } from './manifest.ts'
import { MarkLedger } from './mark-ledger.ts'
import { type RbdCluster, rbdImageOf } from './rbd.ts'
import { emit, type RunOptions } from './run-options.ts'
import type { StorageDriver } from './storage.ts'
import { backupOfKey } from './storage-layout.ts'
import { tellCommands } from './tell-commands.ts'

/** An image that a restore makes, and the one that it replaces, have the id of the run at their end. */
const IMAGE_OF_RUN = /\.varve-(?:restore|replaced)-(.+)$/

/** Something of Varve's in a Ceph cluster that no run and no backup knows, as after the loss of a state folder. */
export interface RbdOrphan {
  /** `<pool>/[<namespace>/]<image>` */
  readonly image: string
  /** The snapshot `varve-<id>` of that image; absent where it is the image as a whole. */
  readonly snapshot?: string
  /** The backup of the snapshot, or the restore that made or replaced the image. */
  readonly run: string
}

/** What {@link findOrphans} works with. */
export interface FindOrphansOptions {
  /** Where the instances live; it has a connector for RBD. */
  host: Host
  /** Every storage that backups of these instances are on. What belongs to another one looks like an orphan. */
  storages: readonly StorageDriver[]
  /** The state folder of the pipelines. */
  stateDir: string
}

/**
 * Looks for snapshots and images that no run and no backup knows: on the RBD images that the backups on the storages
 * were taken of, on those that their instances, and those of the state folder's records, have by now, and beside them.
 * It removes nothing, as it cannot tell what belongs to a storage that it is not given. What a journal of this machine knows is left to {@link recover}; what is younger than a day is left out, as another
 * machine may be at it. Reads every manifest.
 *
 * @throws what the storages and the cluster throw
 */
export async function findOrphans(
  { host, storages, stateDir }: FindOrphansOptions,
  run: RunOptions = {},
): Promise<RbdOrphan[]> {
  const catalogs: Catalog[] = []
  for (const storage of storages) {
    catalogs.push(await readCatalog(tellCommands(storage, run.onEvent), '', run.signal))
  }
  const unsettled = new Set(await RunJournal.unsettled(stateDir))
  const stored = new Set(
    catalogs.flatMap(({ objects }) => [...objects.keys()].map(key => backupOfKey(key)?.backup)),
  )
  const isOrphan = (id: string) =>
    isBackupId(id) &&
    !stored.has(id) &&
    !unsettled.has(id) &&
    Date.now() - backupTime(id).getTime() > DEFAULT_GARBAGE_AGE_MS
  const orphans: RbdOrphan[] = []
  const pools = new Set<string>()
  const instances = new Set([
    ...catalogs.flatMap(({ backups }) => backups.map(({ manifest }) => manifest.instance.name)),
    ...(await MarkLedger.instances(stateDir)),
  ])
  const images = new Map([...sources(catalogs), ...(await currentImages(host, instances, run))])
  for (const [image, disk] of images) {
    const cluster = await host.rbd(disk, run)
    for (const snapshot of await snapshotsOf(cluster, image, run)) {
      const id = backupOfMark(snapshot) ?? ''
      if (isOrphan(id)) orphans.push({ image, snapshot, run: id })
    }
    const pool = image.slice(0, image.lastIndexOf('/'))
    if (pools.has(pool)) continue
    pools.add(pool)
    // also those that were to become an image which no backup knows yet
    for (const beside of await cluster.imagesBeside(image, run)) {
      const id = IMAGE_OF_RUN.exec(beside)?.[1] ?? ''
      if (isOrphan(id)) orphans.push({ image: beside, run: id })
    }
  }
  return orphans
}

/** What tells the cluster of an image; undefined where it is that of the connector. */
type DiskOf = Parameters<Host['rbd']>[0]

/** The RBD images that were backed up, each with the disk of its newest backup. */
function sources(catalogs: readonly Catalog[]): Map<string, DiskOf> {
  const newest = new Map<string, BackupManifest>()
  for (const { manifest } of catalogs.flatMap(({ backups }) => backups)) {
    for (const { source } of manifest.disks) {
      if (source.format !== 'rbd' || manifest.id < (newest.get(source.path)?.id ?? '')) continue
      newest.set(source.path, manifest)
    }
  }
  return new Map([...newest].map(([image, manifest]) => [image, clusterOf(manifest, image)]))
}

/** Without a definition an image was backed up by its name alone. */
function clusterOf({ definition, disks, instance }: BackupManifest, image: string): DiskOf {
  const disk = disks.find(({ source }) => source.path === image)
  return definition && disk ? { instance: instance.name, disk: disk.name } : undefined
}

/** What a libvirt that is not there, or does not answer, fails with: images can be backed up without one. */
const NO_ANSWER: ReadonlySet<ErrorCode> = new Set(['COMMAND_FAILED', 'COMMAND_MISSING', 'COMMAND_TIMEOUT'])

/**
 * The RBD images that instances have by now, which need not be those of any backup that is left. Where the host does not
 * tell, that is warned of, and those of the backups are looked at all the same.
 */
async function currentImages(
  host: Host,
  instances: ReadonlySet<string>,
  run: RunOptions,
): Promise<Map<string, DiskOf>> {
  const images = new Map<string, DiskOf>()
  for (const instance of instances) {
    try {
      const { disks } = await host.disks(instance, run)
      for (const { name, path } of disks) {
        const image = rbdImageOf(path)
        if (image !== undefined) images.set(image, { instance, disk: name })
      }
    } catch (error) {
      if (isVarveError(error, 'INSTANCE_NOT_FOUND')) continue
      if (!isVarveError(error) || !NO_ANSWER.has(error.code)) throw error
      const message = `Only images that backups name are looked at, as what the instances have by now is not known: ${error.message}`
      emit(run, { type: 'warning', message })
      break
    }
  }
  return images
}

async function snapshotsOf(cluster: RbdCluster, image: string, run: RunOptions): Promise<string[]> {
  try {
    return (await cluster.image(image, run)).snapshots.map(({ name }) => name)
  } catch (error) {
    if (isVarveError(error, 'DISK_NOT_FOUND')) return []
    throw error
  }
}
