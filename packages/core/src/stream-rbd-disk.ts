import { Readable } from 'node:stream'
import { type BackupContext, stage } from './backup-context.ts'
import type { DiskPlan } from './backup-plan.ts'
import { BlockDigester } from './digest.ts'
import { VarveError } from './errors.ts'
import type { RbdDisk } from './host.ts'
import type { RbdManifestDisk } from './manifest.ts'
import { Progress } from './progress.ts'
import { putFile } from './put-file.ts'
import type { RateLimit } from './rate-limit.ts'
import type { RbdDiffStream, RbdSnapshot } from './rbd.ts'
import { encodeDiffIndex } from './rbd-diff-index.ts'
import type { RunOptions } from './run-options.ts'
import { bytesBody } from './storage.ts'
import { uploadOf, verifyUploads } from './verify-upload.ts'

/** Uploads what `rbd export-diff` writes of an image's snapshot, and where the records are in it. */
export async function streamRbdDisk(
  backup: BackupContext & { run: RunOptions & { signal: AbortSignal } },
  disk: RbdDisk,
  plan: DiskPlan,
  snapshots: ReadonlyMap<string, RbdSnapshot>,
  limit: RateLimit | undefined,
): Promise<RbdManifestDisk> {
  const { storage, folder, run, request } = backup
  const { signal } = run
  const snapshot = snapshots.get(disk.name)
  if (!snapshot)
    throw new VarveError('SNAPSHOT_FAILED', `The disk ${disk.name} was not frozen. Back up again.`)
  const since = plan.kind === 'incremental' ? { from: plan.since } : {}
  stage(run, 'upload', `Uploading ${disk.name} (${plan.kind})`)

  const image = `${disk.name}.rbd-diff`
  const blocks = `${disk.name}.blake3`
  const progress = new Progress(run, disk.name, disk.virtualSize)
  const source = disk.cluster.exportDiff(disk.image, { snapshot: snapshot.name, ...since }, run)
  const digester = new BlockDigester()
  const body = digested(source, { digester, limit, signal, onPosition: at => progress.update(at) })
  const upload = Readable.from(body, { objectMode: false, highWaterMark: 1 })
  try {
    await storage.put(`${folder}/${image}`, upload, { signal })
  } finally {
    source.stream.destroy() // also where the storage failed before it began to read
  }
  await assertSnapshotsStood(disk, [snapshot, ...parentSnapshot(disk, plan)], run)
  const diff = source.diff()
  const { size, digest, blocks: blockList } = digester.finish()
  await storage.put(`${folder}/${blocks}`, bytesBody(blockList), { signal })
  const uploads = [{ key: `${folder}/${image}`, size, digest }, uploadOf(`${folder}/${blocks}`, blockList)]
  if (request.verifyUpload === 'digest') await verifyUploads(storage, uploads, signal)
  const index = await putFile(backup, `${disk.name}.index`, encodeDiffIndex(diff))
  progress.finish()

  return {
    name: disk.name,
    kind: plan.kind,
    image,
    blocks,
    format: 'rbd-diff',
    virtualSize: diff.size,
    storedSize: size,
    digest,
    index,
    snapshot,
    ...(plan.kind === 'incremental' && { backing: plan.backing }),
    ...(plan.kind === 'full' && plan.fallback && { fallback: plan.fallback }),
    source: { path: disk.image, format: 'rbd', imageId: disk.state.id },
  }
}

function parentSnapshot(disk: RbdDisk, plan: DiskPlan): RbdSnapshot[] {
  return plan.kind === 'incremental' ? disk.state.snapshots.filter(({ name }) => name === plan.since) : []
}

/**
 * A snapshot that is removed while `rbd export-diff` reads takes what it held along: rbd ends well all the same, with
 * ranges left out or of a later time. A number is never used again, so one that is there at the end was there throughout.
 *
 * @throws RBD_SNAPSHOT_NOT_FOUND
 */
async function assertSnapshotsStood(
  { name: disk, image, cluster }: RbdDisk,
  needed: readonly RbdSnapshot[],
  run: RunOptions,
): Promise<void> {
  const present = new Map((await cluster.snapshots(image, run)).map(({ name, id }) => [name, id]))
  const gone = needed.find(({ name, id }) => present.get(name) !== id)
  if (!gone) return
  throw new VarveError(
    'RBD_SNAPSHOT_NOT_FOUND',
    `The snapshot ${gone.name} of ${image} was removed while it was read, so what was read is not to be trusted. Nothing was published: back up again, and see what removes snapshots of this image.`,
    { context: { disk, image, snapshot: gone.name }, retryable: true },
  )
}

/** The chunks of a stream on their way to the storage. Where the stream is not whole they fail too, and so does the upload. */
async function* digested(
  source: RbdDiffStream,
  {
    digester,
    limit,
    signal,
    onPosition,
  }: {
    digester: BlockDigester
    limit: RateLimit | undefined
    signal: AbortSignal
    onPosition: (position: number) => void
  },
): AsyncGenerator<Uint8Array> {
  for await (const chunk of source.stream as AsyncIterable<Buffer>) {
    await limit?.take(chunk.length, signal)
    digester.update(chunk)
    onPosition(source.position)
    yield chunk
  }
}
