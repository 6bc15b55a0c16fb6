import { type ImageLayer, openImage, type Qcow2Image } from '@varve/qcow2'
import type { StoredBackup } from './backups.ts'
import { assertListsFit, blockListBytes } from './block-list.ts'
import { BlockPool } from './block-pool.ts'
import type { DiskLayer } from './disk-chain.ts'
import type { DownloadRetry } from './download.ts'
import { errorMessage, isVarveError, VarveError } from './errors.ts'
import { fanOut } from './fan-out.ts'
import { imageSize, type Qcow2ManifestDisk } from './manifest.ts'
import { readDiffLayer } from './read-diff-layer.ts'
import type { StorageDriver } from './storage.ts'
import { VerifiedObject } from './verified-object.ts'

/** Layers whose lists of digests are fetched at one time. */
const OPENING = 4
/** Memory for each run of an image: 16 bytes, twice while the list grows, and as much for the merged list. */
const RUN_BYTES = 64

/** What {@link openLayers} opens. */
export interface OpenLayersOptions {
  readonly storage: StorageDriver
  /** The newest first. */
  readonly layers: readonly DiskLayer[]
  /** Bytes of memory for blocks. */
  readonly memory: number
  readonly signal: AbortSignal
  readonly retry?: DownloadRetry | undefined
}

/** The stored images of a disk's layers, the newest first. */
export interface OpenedLayers {
  readonly objects: readonly VerifiedObject[]
  readonly images: readonly ImageLayer[]
  /** The memory for their blocks. */
  readonly pool: BlockPool
}

/**
 * Opens the image of every layer and reads its tables; each must be what its manifest says. All objects are
 * looked at before any table is read.
 */
export async function openLayers(options: OpenLayersOptions): Promise<OpenedLayers> {
  assertLayersFit(options)
  const pool = blockPool(options)
  const objects = await openObjects(options, pool)
  const images: ImageLayer[] = []
  for (const [index, object] of objects.entries()) {
    const layer = options.layers[index]
    if (!layer) continue // never: there is an object for each layer
    images.push(await readLayer(object, layer, options))
  }
  return { objects, images, pool }
}

/**
 * Refuses layers that the memory does not suffice for, by what their manifests say.
 *
 * @throws INVALID_ARGUMENT
 */
export function assertLayersFit(options: Pick<OpenLayersOptions, 'layers' | 'memory'>): void {
  blockPool(options)
  assertListsFit(
    options.layers.reduce((sum, { disk }) => sum + blockListBytes(disk.storedSize, disk.digest), 0),
  )
}

function blockPool({ layers, memory }: Pick<OpenLayersOptions, 'layers' | 'memory'>): BlockPool {
  const blockSize = layers.reduce((largest, { disk }) => Math.max(largest, disk.digest.blockSize), 0)
  const needed = blockSize * BlockPool.leastBlocks
  if (needed > memory) {
    throw new VarveError(
      'INVALID_ARGUMENT',
      `The backup is stored in blocks of ${blockSize} bytes: its restore needs ${needed} bytes of memory and may use ${memory}. Allow it more.`,
      { context: { blockSize, needed, memory } },
    )
  }
  return new BlockPool(memory, blockSize)
}

function openObjects(options: OpenLayersOptions, pool: BlockPool): Promise<VerifiedObject[]> {
  const { storage, layers, signal, retry } = options
  return fanOut(layers, { concurrency: OPENING, signal }, ({ backup, disk }, signal) => {
    const key = `${backup.folder}/${disk.image}`
    const blocksKey = `${backup.folder}/${disk.blocks}`
    const { storedSize: size, digest } = disk
    return VerifiedObject.open({ storage, key, size, digest, blocksKey, pool, retry }, { signal })
  })
}

async function readLayer(
  object: VerifiedObject,
  { backup, disk }: DiskLayer,
  options: OpenLayersOptions,
): Promise<ImageLayer> {
  if (disk.format === 'rbd-diff') return readDiffLayer({ ...options, backup, disk })
  const image = await readImage(object, { backup, disk }, options.signal)
  assertRecorded(image, backup, disk, object.key)
  return image
}

async function readImage(
  object: VerifiedObject,
  { backup, disk }: DiskLayer,
  signal: AbortSignal,
): Promise<Qcow2Image> {
  try {
    // Of what is left when the layers before have been read: their sum is bounded too.
    const maxRuns = Math.floor(process.availableMemory() / 2 / RUN_BYTES)
    return await openImage(object, { signal, maxRuns })
  } catch (error) {
    if (isVarveError(error)) throw error
    throw new VarveError(
      'IMAGE_INVALID',
      `${object.key} cannot be restored: ${errorMessage(error)} Restore another backup.`,
      { context: { key: object.key, backup: backup.manifest.id, disk: disk.name }, cause: error },
    )
  }
}

/** A whole image that is not the one of the manifest would give a wrong disk without any other error. */
function assertRecorded(image: Qcow2Image, backup: StoredBackup, disk: Qcow2ManifestDisk, key: string): void {
  const found = { size: image.virtualSize, backing: image.backing?.name, format: image.backing?.format }
  const format = disk.backing === undefined ? undefined : 'qcow2'
  const size = imageSize(disk)
  if (found.size === size && found.backing === disk.backing && found.format === format) return
  const { id } = backup.manifest
  throw new VarveError(
    'IMAGE_INVALID',
    `${key} is not the image of the manifest: it has a disk of ${found.size} bytes on ${found.backing ?? 'nothing'} instead of ${size} on ${disk.backing ?? 'nothing'}. Restore another backup.`,
    { context: { key, backup: id, disk: disk.name, ...found } },
  )
}
