import { Qcow2Error } from './errors.ts'
import { ExtentKind } from './extent-list.ts'
import type { ImageExtents } from './image-extents.ts'
import { LayeredExtents, NO_LAYER } from './layered-extents.ts'

/** What {@link mergeLayers} needs of a layer: a qcow2 image that was read, or any other file that says as much. */
export interface ImageLayer {
  /** The size of the disk in bytes. */
  readonly virtualSize: number
  /** What the layer rests on; absent in a full one, whose unallocated runs read as zeros. */
  readonly backing?: unknown
  /** What the layer holds. */
  readonly extents: ImageExtents
}

/**
 * Where each byte of a chain's newest image is: in the newest layer that has it. Layers may differ in cluster
 * size and in size; as QEMU reads them, what lies after the end of a layer is zeros, whatever older layers hold
 * there. One pass over all layers at once.
 *
 * `layers` begins with the newest and ends with the full one, which alone has no backing file; otherwise throws
 * `QCOW2_ARGUMENT`. That each layer's backing name means the next one is for the caller to check.
 */
export function mergeLayers(layers: readonly ImageLayer[]): LayeredExtents {
  checkChain(layers)
  const cursors = layers.map(layer => new LayerCursor(layer))
  const merged = new LayeredExtents()
  const size = layers[0]?.virtualSize ?? 0
  for (let position = 0; position < size; ) {
    let end = size
    let found = NO_LAYER
    let fileOffset = -1
    for (const [index, cursor] of cursors.entries()) {
      if (position >= cursor.size) break // zeros: this layer hides all older ones here
      cursor.moveTo(position)
      end = Math.min(end, cursor.end)
      if (cursor.kind === ExtentKind.unallocated) continue
      if (cursor.kind === ExtentKind.data) {
        found = index
        fileOffset = cursor.fileOffset + position - cursor.start
      }
      break
    }
    merged.append(end - position, found, fileOffset)
    position = end
  }
  return merged
}

/** The run of a layer that a position is in; positions only grow. */
class LayerCursor {
  readonly size: number
  start = 0
  end = 0
  kind: ExtentKind = ExtentKind.unallocated
  fileOffset = -1
  readonly #extents: ImageExtents
  #index = -1

  constructor(layer: ImageLayer) {
    this.size = layer.virtualSize
    this.#extents = layer.extents
  }

  moveTo(position: number): void {
    while (position >= this.end) {
      this.#index++
      this.start = this.end
      this.end += this.#extents.length(this.#index)
    }
    this.kind = this.#extents.kind(this.#index)
    this.fileOffset = this.#extents.fileOffset(this.#index)
  }
}

function checkChain(layers: readonly ImageLayer[]): void {
  if (layers.length === 0) throw new Qcow2Error('QCOW2_ARGUMENT', 'A chain has at least one layer.')
  const full = layers.findIndex(layer => layer.backing === undefined)
  if (full === layers.length - 1) return
  throw new Qcow2Error(
    'QCOW2_ARGUMENT',
    full < 0
      ? 'The last layer of the chain has a backing file: the full one is missing.'
      : `Layer ${full} has no backing file, and older layers follow it.`,
    { layers: layers.length },
  )
}
