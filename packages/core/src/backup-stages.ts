import { mkdtemp, readFile, stat } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { NbdClient } from '@varve/nbd'
import { ComposedImage, planImage } from '@varve/qcow2'
import PQueue from 'p-queue'
import type { BackupRequest } from './backup-pipeline.ts'
import { type BackupPlan, BITMAP_GRANULARITY, bitmapName, type DiskPlan } from './backup-plan.ts'
import type { StoredBackup } from './backups.ts'
import { objectsOf } from './chain.ts'
import { runCommand } from './command.ts'
import { blake3Hex } from './digest.ts'
import { diskError } from './disk-error.ts'
import { abortError, errorMessage, isVarveError, VarveError } from './errors.ts'
import type { BackupStage } from './events.ts'
import type { DiskOverlay, Host, Instance } from './host.ts'
import { imageExtents } from './image-extents.ts'
import { ImageUpload } from './image-upload.ts'
import type { RunJournal } from './journal.ts'
import {
  type BackupManifest,
  type Consistency,
  MANIFEST_VERSION,
  type ManifestDisk,
  type ManifestFile,
  serializeManifest,
} from './manifest.ts'
import { Progress } from './progress.ts'
import { exportDisk } from './qemu-nbd.ts'
import { RateLimit } from './rate-limit.ts'
import { emit, type RunOptions } from './run-options.ts'
import { bytesBody, type StorageDriver } from './storage.ts'
import { MANIFEST_FILE } from './storage-layout.ts'
import { verifyUpload } from './verify-upload.ts'
import { VERSION } from './version.ts'

/** What the stages of one backup share. */
export interface BackupContext {
  readonly id: string
  /** Where it goes on the storage. */
  readonly folder: string
  readonly host: Host
  readonly storage: StorageDriver
  readonly instance: Instance
  readonly request: BackupRequest
  readonly plan: BackupPlan
  readonly journal: RunJournal
  readonly run: RunOptions
  readonly startedAt: Date
}

/** Tells that a stage begins, unless the run was given up. */
export function stage(run: RunOptions, name: BackupStage, message: string): void {
  if (run.signal?.aborted) throw abortError(run.signal)
  emit(run, { type: 'stage', stage: name, message })
}

/** Begins a bitmap of this backup's on every qcow2 disk, before the freeze: no write falls between the two. */
export async function mark({ id, host, instance, plan, journal, run }: BackupContext): Promise<void> {
  const disks = plan.disks.map(({ disk }) => disk).filter(({ holdsBitmaps }) => holdsBitmaps)
  if (disks.length === 0) return
  const bitmap = bitmapName(id)
  stage(run, 'mark', `Adding the bitmap ${bitmap}`)
  await journal.record({ step: 'bitmap-add', bitmap, disks: disks.map(({ name }) => name) })
  await host.addBitmap(instance.name, disks, bitmap, BITMAP_GRANULARITY, run)
}

/** The moment that a backup shows. */
export interface Frozen {
  readonly at: Date
  readonly consistency: Consistency
  /** The UEFI variables at that moment. */
  readonly nvram?: Buffer
}

/** Freezes the disks of a running instance by one snapshot; those of a stopped one are still anyway. */
export async function freeze(backup: BackupContext): Promise<Frozen> {
  const { instance, run } = backup
  const frozen = instance.running
    ? await snapshot(backup)
    : ({ at: new Date(), consistency: 'offline' } as const)
  const nvram = instance.nvram === undefined ? undefined : await readNvram(instance.nvram, run)
  return { ...frozen, ...(nvram && { nvram }) }
}

async function snapshot(backup: BackupContext): Promise<Frozen> {
  const { id, host, instance, plan, journal, run, request } = backup
  stage(
    run,
    'freeze',
    `Freezing ${plan.disks.length === 1 ? 'one disk' : `${plan.disks.length} disks`} by a snapshot`,
  )
  const overlays = await Promise.all(
    plan.disks.map(
      async ({ disk }): Promise<DiskOverlay> => ({
        disk: disk.name,
        base: disk.path,
        baseFormat: disk.format,
        overlay: await host.overlayPath(disk, id),
      }),
    ),
  )
  const frozen = request.freeze !== undefined && request.freeze !== 'off' && (await freezeFilesystems(backup))
  try {
    await journal.record({ step: 'snapshot', overlays })
    await host.snapshot(instance.name, overlays, run)
    return { at: new Date(), consistency: frozen ? 'filesystem' : 'crash' }
  } finally {
    if (frozen) await thaw(backup)
  }
}

async function freezeFilesystems(backup: BackupContext): Promise<boolean> {
  const { host, instance, journal, run, request } = backup
  await journal.record({ step: 'filesystem-freeze' })
  try {
    await host.freezeFilesystems(instance.name, run)
    return true
  } catch (error) {
    const unreached = isVarveError(error, 'FREEZE_FAILED') && error.context.agent === false
    if (unreached) await journal.record({ step: 'filesystem-thawed' })
    else await thaw(backup) // it may have frozen some file systems before it failed
    if (request.freeze !== 'try' || !isVarveError(error, 'FREEZE_FAILED')) throw error
    emit(run, { type: 'warning', message: `${error.message} The backup is crash-consistent.` })
    return false
  }
}

async function thaw({ host, instance, journal, run: { onEvent } }: BackupContext): Promise<void> {
  await host.thawFilesystems(instance.name, onEvent ? { onEvent } : {}) // without the signal: also after an abort
  await journal.record({ step: 'filesystem-thawed' })
}

/**
 * What shows that somebody wrote to the raw disks of an instance that is off with a program that does not ask QEMU's
 * locks, such as `dd`. A block device shows nothing.
 */
async function rawDiskTimes({ instance, plan }: BackupContext): Promise<ReadonlyMap<string, bigint>> {
  const times = new Map<string, bigint>()
  for (const { disk } of plan.disks) {
    if (instance.running || disk.format !== 'raw' || disk.blockDevice) continue
    times.set(disk.name, (await stat(disk.path, { bigint: true })).mtimeNs)
  }
  return times
}

/** Streams the image of every disk to the storage, several at once; the first failure ends the others. */
export async function stream(backup: BackupContext): Promise<ManifestDisk[]> {
  const { plan, journal, run, request, folder } = backup
  stage(run, 'export', 'Serving the frozen disks with qemu-nbd')
  const sockets = await mkdtemp(join(tmpdir(), 'varve-nbd-'))
  await journal.record({ step: 'export', folder: sockets })
  await journal.record({ step: 'upload', folder })
  stage(run, 'stream', 'Reading what is to be stored')
  const before = await rawDiskTimes(backup)

  const failed = new AbortController()
  const signal = run.signal ? AbortSignal.any([run.signal, failed.signal]) : failed.signal
  const limit = request.bandwidth === undefined ? undefined : new RateLimit(request.bandwidth)
  const queue = new PQueue({ concurrency: request.concurrency ?? 2 })
  const results = await Promise.allSettled(
    plan.disks.map(disk =>
      queue.add(async () => {
        try {
          return await streamDisk({ ...backup, run: { ...run, signal } }, disk, sockets, limit)
        } catch (error) {
          const failure = diskError(disk.disk.name, error)
          failed.abort(failure)
          throw failure
        }
      }),
    ),
  )
  if (failed.signal.aborted) throw run.signal?.aborted ? abortError(run.signal) : failed.signal.reason
  for (const [disk, time] of await rawDiskTimes(backup)) {
    if (time === before.get(disk)) continue
    throw new VarveError(
      'DISK_BUSY',
      `The raw disk ${disk} was written to while it was read as that of an instance that is off. Nothing was published; back up again while it stays off, or as a running libvirt domain.`,
      { context: { disk }, retryable: true },
    )
  }
  return results.flatMap(result => (result.status === 'fulfilled' ? [result.value] : []))
}

/** Serves one disk and uploads its image; a server that dies ends the upload at once. */
async function streamDisk(
  backup: BackupContext,
  plan: DiskPlan,
  sockets: string,
  limit: RateLimit | undefined,
): Promise<ManifestDisk> {
  const { run } = backup
  const { signal: given = new AbortController().signal } = run
  const { disk } = plan
  given.throwIfAborted()
  await using server = await exportDisk({
    ...run,
    disk: disk.name,
    path: disk.path,
    format: disk.format,
    writable: false,
    // A running instance writes to its overlay, and keeps others from the disk itself.
    refuseWriters: !backup.instance.running,
    folder: sockets,
    ...(plan.kind === 'incremental' && { bitmap: plan.bitmap }),
  })
  const signal = AbortSignal.any([given, server.died])
  await using client = await NbdClient.connect(
    { socketPath: server.socketPath },
    {
      metaContexts: ['base:allocation', ...(plan.kind === 'incremental' ? [dirtyContext(plan.bitmap)] : [])],
      signal,
    },
  )
  try {
    return await uploadDisk({ ...backup, run: { ...run, signal } }, plan, client, limit, signal)
  } catch (error) {
    throw server.died.aborted && !given.aborted ? server.died.reason : error
  }
}

/** QEMU's NBD interop document. */
function dirtyContext(bitmap: string): string {
  return `qemu:dirty-bitmap:${bitmap}`
}

async function uploadDisk(
  { id, storage, folder, run, request }: BackupContext,
  plan: DiskPlan,
  client: NbdClient,
  limit: RateLimit | undefined,
  signal: AbortSignal,
): Promise<ManifestDisk> {
  const { disk } = plan
  const maps = await client.mapExtents({ signal })
  const allocation = maps.get('base:allocation')
  const dirty = plan.kind === 'incremental' ? maps.get(dirtyContext(plan.bitmap)) : undefined
  if (!allocation || (plan.kind === 'incremental' && !dirty)) {
    throw new VarveError('NBD_FAILED', `qemu-nbd does not tell the extents of ${disk.name} (${disk.path}).`, {
      context: { disk: disk.name },
    })
  }
  const clusterSize = request.clusterSize ?? 65_536
  const extents = imageExtents({
    size: client.size,
    clusterSize,
    allocation,
    ...(plan.kind === 'incremental' && dirty && { since: { dirty, size: plan.parentSize } }),
  })
  const layout = planImage(extents, {
    clusterSize,
    ...(plan.kind === 'incremental' && { backing: { name: plan.backing, format: 'qcow2' } }),
  })

  stage(run, 'upload', `Uploading ${disk.name} (${plan.kind})`)
  const image = `${disk.name}.qcow2`
  const blocks = `${disk.name}.blake3`
  const composed = new ComposedImage(layout, client)
  const upload = new ImageUpload(composed, { disk: disk.name, signal, ...(limit && { limit }) })
  const progress = new Progress(run, disk.name, upload.size)
  await storage.put(`${folder}/${image}`, upload, { signal, onProgress: bytes => progress.update(bytes) })
  const digested = await upload.digest()
  await storage.put(`${folder}/${blocks}`, bytesBody(digested.blocks), { signal })
  await verifyUpload(
    storage,
    `${folder}/${image}`,
    upload.size,
    digested.digest,
    request.verifyUpload ?? 'size',
    signal,
  )
  await verifyUpload(storage, `${folder}/${blocks}`, digested.blocks.byteLength, undefined, 'size', signal)
  progress.finish()

  return {
    name: disk.name,
    kind: plan.kind,
    image,
    blocks,
    format: 'qcow2',
    virtualSize: client.size,
    storedSize: upload.size,
    clusterSize,
    digest: digested.digest,
    ...(plan.kind === 'incremental' && { backing: plan.backing }),
    ...(disk.holdsBitmaps && { bitmap: { name: bitmapName(id), granularity: BITMAP_GRANULARITY } }),
    ...(plan.kind === 'full' && plan.fallback && { fallback: plan.fallback }),
    source: { path: disk.path, format: disk.format },
  }
}

/** Stores the instance's definition and writes down what the backup is. */
export async function describe(
  backup: BackupContext,
  frozen: Frozen,
  disks: readonly ManifestDisk[],
): Promise<BackupManifest> {
  const { id, instance, plan, run, startedAt } = backup
  const definition = instance.definition === undefined ? undefined : Buffer.from(instance.definition)
  const { name, uuid } = instance
  return {
    version: MANIFEST_VERSION,
    id,
    chain: plan.parent?.manifest.chain ?? id,
    ...(plan.parent && { parent: plan.parent.manifest.id }),
    kind: plan.parent ? 'incremental' : 'full',
    instance: { name, ...(uuid !== undefined && { uuid }) },
    startedAt: startedAt.toISOString(),
    frozenAt: frozen.at.toISOString(),
    finishedAt: new Date().toISOString(),
    consistency: frozen.consistency,
    running: instance.running,
    disks,
    ...(definition && { definition: await putFile(backup, 'domain.xml', definition) }),
    ...(frozen.nvram && { nvram: await putFile(backup, 'nvram.fd', frozen.nvram) }),
    tools: { varve: VERSION, node: process.version, qemu: await qemuVersion(run) },
  }
}

/**
 * Looks again at what the backup rests on and consists of: during a long upload another machine may have
 * deleted or pruned it.
 *
 * @throws PARENT_MISSING, SIZE_MISMATCH
 */
async function assertPublishable(
  storage: StorageDriver,
  backup: StoredBackup,
  parent: StoredBackup | undefined,
  run: RunOptions,
): Promise<void> {
  await assertParent(storage, parent, run)
  for (const { key, size } of objectsOf(backup)) {
    const stored = await storage.stat(key, signalOf(run))
    if (stored?.size === size) continue
    throw new VarveError(
      'SIZE_MISMATCH',
      `The storage holds ${stored ? `${stored.size} bytes` : 'nothing'} of ${key}, which was uploaded with ${size} bytes. Nothing was published; look for what removes objects there, then back up again.`,
      { context: { key, expected: size, actual: stored?.size }, retryable: true },
    )
  }
}

async function assertParent(
  storage: StorageDriver,
  parent: StoredBackup | undefined,
  run: RunOptions,
): Promise<void> {
  if (!parent || (await storage.stat(`${parent.folder}/${MANIFEST_FILE}`, signalOf(run)))) return
  const { id } = parent.manifest
  throw new VarveError(
    'PARENT_MISSING',
    `The backup ${id} that this one rests on was deleted during the upload. Nothing was published; back up again.`,
    { context: { parent: id }, retryable: true },
  )
}

/** Writes the manifest, last of all: from there on the backup exists. */
export async function publish(
  { folder, storage, plan, journal, run }: BackupContext,
  manifest: BackupManifest,
  retire: Readonly<Record<string, readonly string[]>>,
): Promise<void> {
  stage(run, 'publish', 'Writing the manifest')
  await assertPublishable(storage, { manifest, folder }, plan.parent, run)
  const key = `${folder}/${MANIFEST_FILE}`
  await journal.record({ step: 'publish', manifest: key, retire })
  await storage.put(key, bytesBody(serializeManifest(manifest)), signalOf(run))
  try {
    await assertParent(storage, plan.parent, run) // see removeBackup
  } catch (error) {
    if (isVarveError(error, 'PARENT_MISSING')) await storage.delete(key)
    throw error
  }
}

async function putFile(
  { storage, folder, run }: BackupContext,
  key: string,
  bytes: Uint8Array,
): Promise<ManifestFile> {
  await storage.put(`${folder}/${key}`, bytesBody(bytes), signalOf(run))
  return { key, size: bytes.byteLength, blake3: blake3Hex(bytes) }
}

async function readNvram(path: string, run: RunOptions): Promise<Buffer | undefined> {
  try {
    return await readFile(path)
  } catch (error) {
    // libvirt makes it at the first start, so an instance that never ran has none.
    emit(run, {
      type: 'warning',
      message: `The UEFI variables are not in the backup: ${errorMessage(error)}`,
    })
    return undefined
  }
}

async function qemuVersion(run: RunOptions): Promise<string> {
  const { stdout } = await runCommand('qemu-nbd', ['--version'], run)
  return /\d+\.\d+\.\d+/.exec(stdout)?.[0] ?? 'unknown'
}

function signalOf({ signal }: RunOptions): { signal?: AbortSignal } {
  return signal ? { signal } : {}
}
