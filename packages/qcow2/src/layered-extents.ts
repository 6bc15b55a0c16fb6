import { Qcow2Error } from './errors.ts'
import { grown } from './grown.ts'

/** The layer of a run that reads as zeros. */
export const NO_LAYER = -1

/**
 * What a chain of images reads as: contiguous runs that cover the disk from its first byte to its last, each
 * with the image and the place in it that hold its bytes. Typed arrays of 20 bytes a run. No two neighbours are
 * contiguous in the same file, or both zeros.
 */
export class LayeredExtents {
  #count = 0
  #size = 0
  #starts = new Float64Array(16)
  #layers = new Int32Array(16)
  #offsets = new Float64Array(16)

  /** The size of the disk in bytes: that of the newest layer. */
  get size(): number {
    return this.#size
  }

  /** The number of runs. */
  get count(): number {
    return this.#count
  }

  /** The first guest byte of run `index`. */
  start(index: number): number {
    return this.#starts[this.#checked(index)] ?? 0
  }

  /** The bytes of run `index`. */
  length(index: number): number {
    const end = index + 1 < this.#count ? this.#starts[index + 1] : this.#size
    return (end ?? 0) - this.start(index)
  }

  /** The index of the layer that holds run `index`, or -1 where it reads as zeros. */
  layer(index: number): number {
    return this.#layers[this.#checked(index)] ?? NO_LAYER
  }

  /** Where run `index` begins in its layer's file, or -1 where it reads as zeros. */
  fileOffset(index: number): number {
    return this.#offsets[this.#checked(index)] ?? -1
  }

  /**
   * Adds a run at the end, which joins a run of zeros. Runs of a layer's data need no joining: an image's own are
   * joined, and where a newer layer ends one it is that layer that goes on.
   * @internal
   */
  append(length: number, layer: number, fileOffset: number): void {
    const last = this.#count > 0 ? this.#layers[this.#count - 1] : undefined
    if (layer !== NO_LAYER || last !== NO_LAYER) {
      if (this.#count === this.#starts.length) {
        this.#starts = grown(this.#starts)
        this.#layers = grown(this.#layers)
        this.#offsets = grown(this.#offsets)
      }
      this.#starts[this.#count] = this.#size
      this.#layers[this.#count] = layer
      this.#offsets[this.#count] = fileOffset
      this.#count++
    }
    this.#size += length
  }

  #checked(index: number): number {
    if (Number.isInteger(index) && index >= 0 && index < this.#count) return index
    throw new Qcow2Error('QCOW2_ARGUMENT', `There is no extent ${index} in a chain of ${this.#count}.`, {
      index,
    })
  }
}
