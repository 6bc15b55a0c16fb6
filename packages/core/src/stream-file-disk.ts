import { NbdClient } from '@varve/nbd'
import { ComposedImage, type ImageLayout, planImage } from '@varve/qcow2'
import { type BackupContext, stage } from './backup-context.ts'
import { BITMAP_GRANULARITY, DEFAULT_CLUSTER_SIZE, type DiskPlan, markName } from './backup-plan.ts'
import { DataMapWriter, LostData } from './data-map.ts'
import { abortError, VarveError } from './errors.ts'
import type { FileDisk } from './host.ts'
import { imageExtents } from './image-extents.ts'
import { ImageReader } from './image-reader.ts'
import { ImageUpload } from './image-upload.ts'
import type { Qcow2ManifestDisk } from './manifest.ts'
import { MAP_MAX_BYTES } from './manifest-schema.ts'
import { Progress } from './progress.ts'
import { putFile } from './put-file.ts'
import { readOfflineDisk } from './qemu-img.ts'
import { exportDisk } from './qemu-nbd.ts'
import type { RateLimit } from './rate-limit.ts'
import { readDataMap } from './read-data-map.ts'
import type { RunOptions } from './run-options.ts'
import { bytesBody } from './storage.ts'
import { uploadOf, verifyUploads } from './verify-upload.ts'

/** NBD protocol: what is data, and what reads as zero. */
const ALLOCATION = 'base:allocation'

/** A frozen disk that is served, and the client that has it. The server ends with the client, also where this process dies. */
export interface ServedDisk extends AsyncDisposable {
  readonly client: NbdClient
  /** Aborted when the server ends without having been told to. */
  readonly died: AbortSignal
}

/** Serves a frozen disk. */
export async function serveDisk(
  { run }: BackupContext,
  disk: FileDisk,
  plan: DiskPlan,
  folder: string,
): Promise<ServedDisk> {
  const server = await exportDisk({
    ...run,
    disk: disk.name,
    path: disk.path,
    format: disk.format,
    writable: false,
    // Also of a running instance, which writes to its overlay: somebody's own commit of that would write to the disk.
    refuseWriters: true,
    folder,
    ...(plan.kind === 'incremental' && { bitmap: plan.since }),
  })
  const { died } = server
  try {
    if (plan.kind === 'incremental') await assertBitmapWhole(disk, plan.since, run)
    const metaContexts = [ALLOCATION, ...(plan.kind === 'incremental' ? [dirtyContext(plan.since)] : [])]
    const signal = run.signal ? AbortSignal.any([run.signal, died]) : died
    const client = await NbdClient.connect({ socketPath: server.socketPath }, { metaContexts, signal })
    const dispose = async () => {
      await client.close()
      await server.stop()
    }
    return { client, died, [Symbol.asyncDispose]: dispose }
  } catch (error) {
    await server.stop()
    throw died.aborted && !run.signal?.aborted ? died.reason : error
  }
}

/** Uploads the image of a disk that is served; a server that dies ends the upload at once. */
export async function streamFileDisk(
  backup: BackupContext,
  disk: FileDisk,
  plan: DiskPlan,
  served: ReadonlyMap<string, ServedDisk>,
  limit: RateLimit | undefined,
): Promise<Qcow2ManifestDisk> {
  const server = served.get(disk.name)
  if (!server) throw new VarveError('NBD_FAILED', `The disk ${disk.name} was not served. Back up again.`)
  const { client, died } = server
  const { run } = backup
  const { signal: given = new AbortController().signal } = run
  const signal = AbortSignal.any([given, died])
  try {
    if (signal.aborted) throw abortError(signal)
    return await uploadDisk({ ...backup, run: { ...run, signal } }, disk, plan, client, limit, signal)
  } catch (error) {
    throw died.aborted && !given.aborted ? died.reason : error
  }
}

/**
 * What the disk was planned by may have been changed until it was frozen.
 *
 * @throws SNAPSHOT_FAILED
 */
async function assertBitmapWhole(
  { name: disk, path }: FileDisk,
  since: string,
  run: RunOptions,
): Promise<void> {
  const { bitmaps } = await readOfflineDisk(disk, path, 'qcow2', run)
  if (bitmaps.some(({ name, enabled, twin }) => name === since && enabled && twin === 'agrees')) return
  throw new VarveError(
    'SNAPSHOT_FAILED',
    `The bitmap ${since} of the disk ${disk} was changed by somebody while the backup began, so that what was written since the parent cannot be told. Nothing was published; back up again, which takes a full image of it.`,
    { context: { disk, path, bitmap: since }, retryable: true },
  )
}

/** QEMU's NBD interop document. */
function dirtyContext(bitmap: string): string {
  return `qemu:dirty-bitmap:${bitmap}`
}

async function uploadDisk(
  backup: BackupContext,
  disk: FileDisk,
  plan: DiskPlan,
  client: NbdClient,
  limit: RateLimit | undefined,
  signal: AbortSignal,
): Promise<Qcow2ManifestDisk> {
  const { id, storage, folder, run, request } = backup
  const clusterSize = request.clusterSize ?? DEFAULT_CLUSTER_SIZE
  const { layout, dataMap } = await layOut(backup, disk, plan, client, signal)

  stage(run, 'upload', `Uploading ${disk.name} (${plan.kind})`)
  const image = `${disk.name}.qcow2`
  const blocks = `${disk.name}.blake3`
  using reader = await ImageReader.open({
    ...run,
    disk: disk.name,
    path: disk.path,
    format: disk.format,
    size: client.size,
    server: client,
  })
  const composed = new ComposedImage(layout, reader)
  const upload = new ImageUpload(composed, { disk: disk.name, signal, ...(limit && { limit }) })
  const progress = new Progress(run, disk.name, upload.size)
  await storage.put(`${folder}/${image}`, upload, { signal, onProgress: bytes => progress.update(bytes) })
  const digested = await upload.digest()
  await storage.put(`${folder}/${blocks}`, bytesBody(digested.blocks), { signal })
  const uploads = [
    { key: `${folder}/${image}`, size: upload.size, digest: digested.digest },
    uploadOf(`${folder}/${blocks}`, digested.blocks),
  ]
  if (request.verifyUpload === 'digest') await verifyUploads(storage, uploads, signal)
  const map = dataMap && (await putFile(backup, `${disk.name}.map`, dataMap))
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
    ...(map && { map }),
    ...(disk.holdsBitmaps && { bitmap: { name: markName(id), granularity: BITMAP_GRANULARITY } }),
    ...(plan.kind === 'full' && plan.fallback && { fallback: plan.fallback }),
    source: { path: disk.path, format: disk.format },
  }
}

/**
 * Lays the image out. Without a map of the disk's data, as it were too large to be read, the next increment says of all that
 * reads as zero that it does.
 */
async function layOut(
  backup: BackupContext,
  disk: FileDisk,
  plan: DiskPlan,
  client: NbdClient,
  signal: AbortSignal,
): Promise<{ layout: ImageLayout; dataMap: Uint8Array | undefined }> {
  const { size } = client
  const clusterSize = backup.request.clusterSize ?? DEFAULT_CLUSTER_SIZE
  const isIncrement = plan.kind === 'incremental'
  const map = disk.holdsBitmaps ? new DataMapWriter(size, MAP_MAX_BYTES) : undefined
  const lost = isIncrement
    ? new LostData(
        await readDataMap(backup, disk.name, plan.parentSize, signal),
        plan.parentSize,
        clusterSize,
      )
    : undefined
  const onExtent = (context: string, start: number, end: number, flags: number) => {
    if (context !== ALLOCATION) return
    map?.append(start, end, flags)
    lost?.append(start, end, flags)
  }
  // The image needs no more than its clusters; what is compared with the parent is exact.
  const maps = await client.mapExtents({
    signal,
    granularity: clusterSize,
    ...((map ?? lost) && { onExtent }),
  })
  const allocation = maps.get(ALLOCATION)
  const dirty = isIncrement ? maps.get(dirtyContext(plan.since)) : undefined
  if (!allocation || (isIncrement && !dirty)) {
    throw new VarveError(
      'NBD_FAILED',
      `qemu-nbd does not tell the extents of ${disk.name} (${disk.path}). See that it is of version 6 or newer (qemu-nbd --version); a full backup (type, --type full) does without the bitmap.`,
      {
        context: { disk: disk.name },
      },
    )
  }
  const since = isIncrement && dirty && lost && { dirty, size: plan.parentSize, lost: lost.ranges }
  const extents = imageExtents({ size, clusterSize, allocation, ...(since && { since }) })
  const layout = planImage(extents, {
    clusterSize,
    ...(isIncrement && { backing: { name: plan.backing, format: 'qcow2' } }),
  })
  return { layout, dataMap: map?.finish() }
}
