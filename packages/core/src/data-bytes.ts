import type { LayeredExtents } from '@varve/qcow2'

/** The bytes of a disk that a layer, or one of its newest `layers`, holds as data: what a restore has to write. */
export function dataBytes(merged: LayeredExtents, layers: number = Number.POSITIVE_INFINITY): number {
  let bytes = 0
  for (let i = 0; i < merged.count; i++) {
    if (merged.layer(i) >= 0 && merged.layer(i) < layers) bytes += merged.length(i)
  }
  return bytes
}
