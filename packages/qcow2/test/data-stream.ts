import { once } from 'node:events'
import type { Readable } from 'node:stream'
import { ComposedImage, ExtentKind, ExtentList, type ImageLayout, planImage } from '../src/index.ts'
import { fillPattern } from './chain-model.ts'
import { ControlledGuest } from './controlled-guest.ts'

/** Bytes in a cluster. */
export const CLUSTER = 4096

/** Clusters of the disk; every one is data. */
export const CLUSTERS = 64

/** What the guest has. */
export const DISK: Buffer = Buffer.alloc(CLUSTERS * CLUSTER)
fillPattern(DISK, 1)

/** A stream of data clusters only: each chunk is one read of the guest. */
export function dataStream(options: { readAhead?: number; signal?: AbortSignal } = {}): {
  image: ComposedImage
  guest: ControlledGuest
  stream: Readable
  layout: ImageLayout
} {
  const guest = new ControlledGuest(DISK)
  const list = new ExtentList()
  list.append(DISK.length, ExtentKind.data)
  const layout = planImage(list, { clusterSize: CLUSTER })
  const image = new ComposedImage(layout, guest)
  const stream = image.stream({ start: layout.dataStart, chunkSize: CLUSTER, readAhead: 4, ...options })
  return { image, guest, stream, layout }
}

/** The next chunk. */
export async function take(stream: Readable): Promise<Buffer> {
  for (;;) {
    const chunk: Buffer | null = stream.read()
    if (chunk) return chunk
    await once(stream, 'readable')
  }
}
