import fc from 'fast-check'
import {
  type BackingFile,
  ComposedImage,
  ExtentKind,
  ExtentList,
  type GuestReader,
  type ImageExtents,
  type ImageFile,
  type ImageLayout,
  type LayeredExtents,
  planImage,
} from '../src/index.ts'

/** A guest whose disk is in memory. */
export function memoryGuest(disk: Uint8Array): GuestReader {
  return {
    async read(offset, into) {
      if (offset + into.length > disk.length)
        throw new Error(`read of ${offset}+${into.length} after the end`)
      into.set(disk.subarray(offset, offset + into.length))
    },
  }
}

/** A file that is in memory. */
export function memoryFile(bytes: Uint8Array): ImageFile {
  return { size: bytes.length, read: memoryGuest(bytes).read }
}

/** What an increment rests on. */
export const BACKING = { name: '../0/vda.qcow2', format: 'qcow2' } as const

/** One layer as the test wants it: a kind for each run of clusters. */
export interface LayerPlan {
  readonly clusterSize: number
  /** Bytes of the disk; the runs are cut off at it, or go on with unallocated ones. */
  readonly size: number
  /** Kind and length in clusters of each run. */
  readonly runs: readonly (readonly [ExtentKind, number])[]
  readonly seed: number
}

/** Random layers of at most `maxBytes`, with clusters of 2^12 to 2^`maxBits` bytes and sizes that end anywhere. */
export function layerPlans(maxBits: number, maxBytes: number): fc.Arbitrary<LayerPlan> {
  return fc
    .record({
      bits: fc.integer({ min: 12, max: maxBits }),
      clusters: fc.integer({ min: 0, max: 40 }),
      cut: fc.oneof(fc.constant(0), fc.integer({ min: 0, max: 2 ** maxBits })),
      runs: fc.array(fc.tuple(fc.constantFrom<ExtentKind[]>(0, 1, 2), fc.integer({ min: 1, max: 8 })), {
        maxLength: 12,
      }),
      seed: fc.nat(),
    })
    .map(({ bits, clusters, cut, runs, seed }) => {
      const clusterSize = 2 ** bits
      const most = Math.min(clusters, maxBytes / clusterSize) * clusterSize
      return { clusterSize, size: Math.max(0, most - (cut % clusterSize)), runs, seed }
    })
}

/** The whole file of a layer after which the guest's disk is `disk`. */
export async function compose(
  layer: LayerPlan,
  disk: Uint8Array,
  backing?: BackingFile,
): Promise<{ layout: ImageLayout; file: Buffer }> {
  const { clusterSize } = layer
  const layout = planImage(extentsOf(layer), backing ? { clusterSize, backing } : { clusterSize })
  const file = Buffer.alloc(layout.fileSize, 0xee)
  await new ComposedImage(layout, memoryGuest(disk.subarray(0, layer.size))).read(0, file)
  return { layout, file }
}

/**
 * What a disk holds after a layer, computed in the simplest way: byte by byte over the one before. Its size
 * is rounded up to whole sectors, as QEMU counts them.
 */
export function nextDisk(parent: Uint8Array | undefined, layer: LayerPlan): Buffer {
  const disk = Buffer.alloc(Math.ceil(layer.size / 512) * 512)
  if (parent) disk.set(parent.subarray(0, disk.length))
  let at = 0
  for (const [kind, clusters] of layer.runs) {
    const end = Math.min(layer.size, at + clusters * layer.clusterSize)
    if (at >= end) break
    if (kind !== ExtentKind.unallocated) disk.fill(0, at, end === layer.size ? disk.length : end)
    if (kind === ExtentKind.data) fillPattern(disk.subarray(at, end), layer.seed + at)
    at = end
  }
  return disk
}

/** Runs as a list. */
export function listOf(...runs: readonly (readonly [number, ExtentKind])[]): ExtentList {
  const list = new ExtentList()
  for (const [length, kind] of runs) list.append(length, kind)
  return list
}

/** The extents of a layer. */
export function extentsOf(layer: LayerPlan): ExtentList {
  const list = new ExtentList(1)
  for (const [kind, clusters] of layer.runs)
    list.append(Math.min(clusters * layer.clusterSize, layer.size - list.size), kind)
  list.append(layer.size - list.size, ExtentKind.unallocated)
  return list
}

/** Bytes that differ from place to place and from seed to seed, and are never zero. */
export function fillPattern(bytes: Uint8Array, seed: number): void {
  let state = (seed * 2654435761 + 1) >>> 0
  for (let i = 0; i < bytes.length; i++) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0
    bytes[i] = (state >>> 24) | 1
  }
}

/** The disk that merged layers describe, read from the layers' files. */
export function readMerged(merged: LayeredExtents, files: readonly Uint8Array[]): Buffer {
  const disk = Buffer.alloc(merged.size)
  for (let i = 0; i < merged.count; i++) {
    const file = files[merged.layer(i)]
    if (!file) continue
    const from = merged.fileOffset(i)
    disk.set(file.subarray(from, from + merged.length(i)), merged.start(i))
  }
  return disk
}

/** The extents of an image as plain objects. */
export function extentsAsArray(
  extents: ExtentList | ImageExtents,
): { start: number; length: number; kind: ExtentKind }[] {
  return Array.from({ length: extents.count }, (_, i) => ({
    start: extents.start(i),
    length: extents.length(i),
    kind: extents.kind(i),
  }))
}
