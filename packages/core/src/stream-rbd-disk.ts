import { Readable } from 'node:stream'
import { type BackupContext, stage } from './backup-context.ts'
import type { DiskPlan } from './backup-plan.ts'
import { BlockDigester, blake3Hex, type DigestedObject } from './digest.ts'
import { VarveError } from './errors.ts'
import type { RbdDisk } from './host.ts'
import type { ManifestFile, RbdManifestDisk } from './manifest.ts'
import { Progress } from './progress.ts'
import type { RateLimit } from './rate-limit.ts'
import type { RbdSnapshot } from './rbd.ts'
import { serializeDiffIndex } from './rbd-diff-index.ts'
import { type RbdDiff, RbdDiffParser } from './rbd-diff-parser.ts'
import type { RunOptions } from './run-options.ts'
import { bytesBody } from './storage.ts'
import { verifyUpload } from './verify-upload.ts'

/** Uploads what `rbd export-diff` writes of an image's snapshot, and where the records are in it. */
export async function streamRbdDisk(
  { storage, folder, run, request }: BackupContext & { run: RunOptions & { signal: AbortSignal } },
  disk: RbdDisk,
  plan: DiskPlan,
  snapshots: ReadonlyMap<string, RbdSnapshot>,
  limit: RateLimit | undefined,
): Promise<RbdManifestDisk> {
  const { signal } = run
  const snapshot = snapshots.get(disk.name)
  if (!snapshot)
    throw new VarveError('SNAPSHOT_FAILED', `The disk ${disk.name} was not frozen. Back up again.`)
  const since = plan.kind === 'incremental' ? { from: plan.since } : {}
  stage(run, 'upload', `Uploading ${disk.name} (${plan.kind})`)

  const image = `${disk.name}.rbd-diff`
  const blocks = `${disk.name}.blake3`
  const progress = new Progress(run, disk.name, disk.virtualSize)
  const upload = new DiffUpload({
    source: disk.cluster.exportDiff(disk.image, { snapshot: snapshot.name, ...since }, run),
    parser: new RbdDiffParser({ to: snapshot.name, ...since }),
    onPosition: position => progress.update(position),
    limit,
    signal,
  })
  await storage.put(`${folder}/${image}`, upload.stream, { signal })
  const { diff, digested } = upload.result()
  await storage.put(`${folder}/${blocks}`, bytesBody(digested.blocks), { signal })
  const indexBytes = serializeDiffIndex(diff.index)
  const index: ManifestFile = {
    key: `${disk.name}.index`,
    size: indexBytes.byteLength,
    blake3: blake3Hex(indexBytes),
  }
  await storage.put(`${folder}/${index.key}`, bytesBody(indexBytes), { signal })

  const { size, digest } = digested
  const mode = request.verifyUpload ?? 'size'
  await verifyUpload(storage, `${folder}/${image}`, size, digest, mode, signal)
  await verifyUpload(storage, `${folder}/${blocks}`, digested.blocks.byteLength, undefined, 'size', signal)
  await verifyUpload(storage, `${folder}/${index.key}`, index.size, undefined, 'size', signal)
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

interface DiffUploadOptions {
  readonly source: Readable
  readonly parser: RbdDiffParser
  readonly onPosition: (position: number) => void
  readonly limit: RateLimit | undefined
  readonly signal: AbortSignal
}

/**
 * A stream of `rbd export-diff` on its way to the storage. Its records are followed and its blocks digested; a stream
 * that is not whole fails, so that no storage takes it for an object.
 */
class DiffUpload {
  readonly stream: Readable
  readonly #options: DiffUploadOptions
  #result: { diff: RbdDiff; digested: DigestedObject } | undefined

  constructor(options: DiffUploadOptions) {
    this.#options = options
    this.stream = Readable.from(this.#chunks(), { objectMode: false, highWaterMark: 1 })
  }

  /** What passed. Only to be called once all of it did. */
  result(): { diff: RbdDiff; digested: DigestedObject } {
    if (this.#result) return this.#result
    throw new VarveError(
      'UPLOAD_FAILED',
      'The storage took the stream for whole before its end. Back up again.',
    )
  }

  async *#chunks(): AsyncGenerator<Uint8Array> {
    const { source, parser, onPosition, limit, signal } = this.#options
    const digester = new BlockDigester()
    for await (const chunk of source as AsyncIterable<Buffer>) {
      await limit?.take(chunk.length, signal)
      parser.push(chunk)
      digester.update(chunk)
      onPosition(parser.position)
      yield chunk
    }
    this.#result = { diff: parser.finish(), digested: digester.finish() }
  }
}
