import { ComposedImage, ExtentKind, ExtentList, planImage } from '@varve/qcow2'
import fc from 'fast-check'
import type { StoredBackup } from '../src/backups.ts'
import { BlockDigester } from '../src/digest.ts'
import { type BackupManifest, MANIFEST_VERSION, type ManifestDisk } from '../src/manifest.ts'
import { bytesBody, type StorageDriver } from '../src/storage.ts'

/** One layer as a test wants it. */
export interface LayerPlan {
  readonly clusterSize: number
  /** Bytes of the disk. The runs are cut off at it, or go on with unallocated ones. */
  readonly size: number
  /** Kind and length in clusters of each run. */
  readonly runs: readonly (readonly [ExtentKind, number])[]
  readonly seed: number
}

/** A chain on a storage, and the disk that its newest backup is of. */
export interface StoredChain {
  /** The full backup first. */
  readonly chain: StoredBackup[]
  /** What a restore of `vda` has to give. */
  readonly reference: Buffer
  /** Keys of the images of `vda`, the full one first. */
  readonly images: string[]
}

/** Random layers with clusters of 4 to 32 KiB; disks of at most 1.25 MiB, which grow and shrink from layer to layer. */
export function layerPlans(most = 10): fc.Arbitrary<LayerPlan[]> {
  const runs = fc.array(
    fc.tuple(fc.constantFrom<ExtentKind[]>(0, 1, 2, 2), fc.integer({ min: 1, max: 12 })),
    { maxLength: 16 },
  )
  const layer = fc.record({
    clusterSize: fc.integer({ min: 12, max: 15 }).map(bits => 2 ** bits),
    size: fc.integer({ min: 1, max: 2560 }).map(sectors => sectors * 512),
    runs,
    seed: fc.nat(),
  })
  return fc.array(layer, { minLength: 1, maxLength: most })
}

/** The id of layer `index` of a chain. */
export function layerId(index: number): string {
  return `20260101-0000${String(index).padStart(2, '0')}-000-abcdef`
}

/** Composes the layers, the full one first, and stores them as backups of the disk `vda`. */
export async function storeChain(
  storage: StorageDriver,
  plans: readonly LayerPlan[],
  { blockSize = 64 * 1024 }: { blockSize?: number } = {},
): Promise<StoredChain> {
  const chain: StoredBackup[] = []
  const images: string[] = []
  let reference: Buffer = Buffer.alloc(0)
  for (const [index, plan] of plans.entries()) {
    reference = nextDisk(reference, plan)
    const id = layerId(index)
    const folder = `web-1/${layerId(0)}/${id}`
    const backing = index === 0 ? undefined : `../${layerId(index - 1)}/vda.qcow2`
    const stored = await storeImage(storage, `${folder}/vda`, plan, reference, backing, blockSize)
    images.push(`${folder}/vda.qcow2`)
    chain.push({ folder, manifest: manifestOf(id, index, [stored]) })
  }
  return { chain, reference, images }
}

/** The manifest of one layer. */
function manifestOf(id: string, index: number, disks: readonly ManifestDisk[]): BackupManifest {
  const time = '2026-01-01T00:00:00.000Z'
  return {
    version: MANIFEST_VERSION,
    id,
    chain: layerId(0),
    ...(index > 0 && { parent: layerId(index - 1) }),
    kind: index === 0 ? 'full' : 'incremental',
    instance: { name: 'web-1' },
    startedAt: time,
    frozenAt: time,
    finishedAt: time,
    consistency: 'crash',
    running: true,
    disks,
    tools: {},
  }
}

async function storeImage(
  storage: StorageDriver,
  path: string,
  plan: LayerPlan,
  disk: Buffer,
  backing: string | undefined,
  blockSize: number,
): Promise<ManifestDisk> {
  const { clusterSize } = plan
  const layout = planImage(extentsOf(plan), {
    clusterSize,
    ...(backing !== undefined && { backing: { name: backing, format: 'qcow2' } }),
  })
  const image = Buffer.alloc(layout.fileSize)
  await new ComposedImage(layout, {
    async read(offset, into) {
      into.set(disk.subarray(offset, offset + into.length))
    },
  }).read(0, image)
  const digester = new BlockDigester(blockSize)
  digester.update(image)
  const { size, digest, blocks } = digester.finish()
  await storage.put(`${path}.qcow2`, bytesBody(image))
  await storage.put(`${path}.blake3`, bytesBody(blocks))
  return {
    name: 'vda',
    kind: backing === undefined ? 'full' : 'incremental',
    image: 'vda.qcow2',
    blocks: 'vda.blake3',
    format: 'qcow2',
    virtualSize: layout.virtualSize,
    storedSize: size,
    clusterSize,
    digest,
    ...(backing !== undefined && { backing }),
    source: { path: '/disks/vda.qcow2', format: 'qcow2' },
  }
}

function extentsOf({ clusterSize, size, runs }: LayerPlan): ExtentList {
  const list = new ExtentList()
  for (const [kind, clusters] of runs) list.append(Math.min(clusters * clusterSize, size - list.size), kind)
  list.append(size - list.size, ExtentKind.unallocated)
  return list
}

/** The disk after a layer, in the simplest way: the one before with the layer's runs written over it. */
function nextDisk(before: Buffer, { clusterSize, size, runs, seed }: LayerPlan): Buffer {
  const disk = Buffer.alloc(size)
  before.copy(disk)
  let at = 0
  for (const [kind, clusters] of runs) {
    const end = Math.min(size, at + clusters * clusterSize)
    if (kind === ExtentKind.zero) disk.fill(0, at, end)
    if (kind === ExtentKind.data) fillPattern(disk.subarray(at, end), seed + at)
    at = end
  }
  return disk
}

/** A prime number of bytes, none of them zero, without a short period. */
const PATTERN = new Uint8Array(99_991)
for (let i = 0, state = 1; i < PATTERN.length; i++) {
  state = (Math.imul(state, 1664525) + 1013904223) >>> 0
  PATTERN[i] = (state >>> 24) | 1
}

/** Bytes that differ from place to place and from seed to seed, and are never zero. */
export function fillPattern(bytes: Uint8Array, seed: number): void {
  for (let at = 0, from = (seed * 7919) % PATTERN.length; at < bytes.length; from = 0) {
    const part = PATTERN.subarray(from, from + bytes.length - at)
    bytes.set(part, at)
    at += part.length
  }
}
