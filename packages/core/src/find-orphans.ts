import { backupTime, isBackupId } from './backup-id.ts'
import { backupOfMark } from './backup-plan.ts'
import { type Catalog, readCatalog } from './backups.ts'
import { type ErrorCode, isVarveError } from './errors.ts'
import { DEFAULT_GARBAGE_AGE_MS } from './garbage.ts'
import type { Host } from './host.ts'
import { RunJournal } from './journal.ts'
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
  const instances = new Set([
    ...catalogs.flatMap(({ backups }) => backups.map(({ manifest }) => manifest.instance.name)),
    ...(await MarkLedger.instances(stateDir)),
  ])
  const places = [...sources(catalogs), ...(await currentImages(host, instances, run))]
  const found = new Map<string, RbdOrphan>()
  const add = (orphan: RbdOrphan) => isOrphan(orphan.run) && found.set(JSON.stringify(orphan), orphan)
  const seen = new Set<string>()
  const isNew = (key: string) => !seen.has(key) && seen.add(key)
  for (const { image, of } of uniquePlaces(places)) {
    const cluster = await host.rbd(of, run)
    if (!isNew(`${cluster.address} ${image}`)) continue
    try {
      for (const snapshot of await snapshotsOf(cluster, image, run))
        add({ image, snapshot, run: backupOfMark(snapshot) ?? '' })
      if (!isNew(`${cluster.address} ${image.slice(0, image.lastIndexOf('/') + 1)}`)) continue
      // also those that were to become an image which no backup knows yet
      for (const beside of await cluster.imagesBeside(image, run))
        add({ image: beside, run: IMAGE_OF_RUN.exec(beside)?.[1] ?? '' })
    } catch (error) {
      if (!isVarveError(error, 'CEPH_POOL_NOT_FOUND')) throw error
      emit(run, { type: 'warning', message: `${image} is not looked at: ${error.message}` })
    }
  }
  return [...found.values()]
}

/** An image, whose it is, and the disk that tells its cluster; without one it is in that of the connector. */
interface Place {
  readonly instance: string
  readonly image: string
  readonly of: Parameters<Host['rbd']>[0]
}

/** The RBD images that were backed up, the newest backup last. */
function sources(catalogs: readonly Catalog[]): Place[] {
  const manifests = catalogs.flatMap(({ backups }) => backups.map(({ manifest }) => manifest))
  manifests.sort((a, b) => (a.id < b.id ? -1 : 1))
  return manifests.flatMap(({ definition, disks, instance }) =>
    disks.flatMap(({ name: disk, source }) => {
      // Without a definition an image was backed up by its name alone.
      const of = definition && { instance: instance.name, disk }
      return source.format === 'rbd' ? [{ instance: instance.name, image: source.path, of }] : []
    }),
  )
}

/** Of an image that an instance had as several disks, the last one. */
function uniquePlaces(places: readonly Place[]): Iterable<Place> {
  return new Map(places.map(place => [JSON.stringify([place.instance, place.image]), place])).values()
}

/** What a libvirt that is not there, or does not answer, fails with: images can be backed up without one. */
const NO_ANSWER: ReadonlySet<ErrorCode> = new Set(['COMMAND_FAILED', 'COMMAND_MISSING', 'COMMAND_TIMEOUT'])

/**
 * The RBD images that instances have by now, which need not be those of any backup that is left. Where the host does not
 * tell, that is warned of, and those of the backups are looked at all the same.
 */
async function currentImages(host: Host, instances: ReadonlySet<string>, run: RunOptions): Promise<Place[]> {
  const images: Place[] = []
  for (const instance of instances) {
    try {
      const { disks } = await host.disks(instance, run)
      for (const { name, path } of disks) {
        const image = rbdImageOf(path)
        if (image !== undefined) images.push({ instance, image, of: { instance, disk: name } })
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
    return (await cluster.snapshots(image, run)).map(({ name }) => name)
  } catch (error) {
    if (isVarveError(error, 'DISK_NOT_FOUND')) return []
    throw error
  }
}
