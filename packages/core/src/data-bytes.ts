import type { LayeredExtents } from '@varve/qcow2'

/** The bytes of a disk that some layer holds as data: what a restore has to write. */
export function dataBytes(merged: LayeredExtents): number {
  let bytes = 0
  for (let i = 0; i < merged.count; i++) if (merged.layer(i) >= 0) bytes += merged.length(i)
  return bytes
}
