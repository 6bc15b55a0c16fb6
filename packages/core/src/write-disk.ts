import type { LayeredExtents } from '@varve/qcow2'
import type { BlockPool, BlockSlot } from './block-pool.ts'
import { abortError } from './errors.ts'
import type { RestoreTarget } from './restore-target.ts'
import { type RestoreWindow, restoreWindows } from './restore-window.ts'
import type { VerifiedObject } from './verified-object.ts'

/** Blocks in one download: long enough that asking for it costs little. */
const WINDOW_BLOCKS = 16

/** Requests for zeros that the target has at one time. */
const ZEROS_IN_FLIGHT = 16

/** What {@link writeDisk} writes. */
export interface WriteDiskOptions {
  readonly merged: LayeredExtents
  /** The image of each layer that is written, the newest first; what older ones hold is on the target already. */
  readonly objects: readonly VerifiedObject[]
  readonly pool: BlockPool
  readonly target: RestoreTarget
  /** Downloads at one time. */
  readonly downloads: number
  /** Whether blocks that nobody needs are skipped; a storage that cannot seek reads through them. */
  readonly seek: boolean
  /** Is told of bytes of the disk as they are written. */
  readonly onWritten: (bytes: number) => void
  readonly signal: AbortSignal
}

/**
 * Writes a whole disk. Each block that is needed is downloaded once and verified, and its runs go to the target
 * straight from the block's memory, many at once; then the memory takes the next block. Settles when nothing
 * is in flight any more: after a failure everything else is given up.
 */
export async function writeDisk(options: WriteDiskOptions): Promise<void> {
  const { objects, merged, pool, target, downloads, seek } = options
  const giveUp = new AbortController()
  const signal = AbortSignal.any([options.signal, giveUp.signal])
  const failures: unknown[] = []
  const fail = (error: unknown): void => {
    failures.push(error)
    giveUp.abort(error)
  }
  // Each of these is one iterator from which several workers take what is next.
  const windows = restoreWindows(merged, {
    blockSizes: objects.map(object => object.blockSize),
    maxBlocks: seek ? WINDOW_BLOCKS : Number.POSITIVE_INFINITY,
    maxGap: seek ? 0 : Number.POSITIVE_INFINITY,
  })
  const zeros = zeroRuns(merged)
  const restoreData = async (): Promise<void> => {
    for (const window of windows) {
      const object = objects[window.layer]
      if (!object) continue // never: the windows are those of `objects`
      const writer = new WindowWriter(window, object.blockSize, { ...options, signal }, fail)
      await object.fetch(window.firstBlock, window.endBlock, writer.write, signal)
    }
  }
  const restoreZeros = async (): Promise<void> => {
    for (const run of zeros) await target.zero(merged.start(run), merged.length(run), { signal })
  }
  const workers = [
    ...Array.from({ length: seek ? downloads : 1 }, restoreData),
    ...Array.from({ length: ZEROS_IN_FLIGHT }, restoreZeros),
  ]
  await Promise.all(workers.map(done => done.catch(fail)))
  await pool.idle()
  if (options.signal.aborted) throw abortError(options.signal)
  if (failures.length > 0) throw failures[0]
}

/** Writes the runs of a window's blocks as the blocks come, in their order. */
class WindowWriter {
  readonly #window: RestoreWindow
  readonly #blockSize: number
  readonly #options: WriteDiskOptions
  readonly #fail: (error: unknown) => void
  #run: number

  constructor(
    window: RestoreWindow,
    blockSize: number,
    options: WriteDiskOptions,
    fail: (error: unknown) => void,
  ) {
    this.#window = window
    this.#blockSize = blockSize
    this.#options = options
    this.#fail = fail
    this.#run = window.firstRun
  }

  /** Starts the writes of a block. Its memory is given back when the last of them has settled. */
  readonly write = (block: number, slot: BlockSlot): void => {
    const { merged, target, pool, signal, onWritten } = this.#options
    const blockStart = block * this.#blockSize
    const blockEnd = blockStart + slot.bytes.length
    let inFlight = 1
    let bytes = 0
    const settled = (): void => {
      if (--inFlight > 0) return
      pool.release(slot)
      if (signal.aborted) return
      try {
        onWritten(bytes)
      } catch (error) {
        this.#fail(error)
      }
    }
    const failed = (error: unknown): void => {
      this.#fail(error)
      settled()
    }
    for (; this.#run <= this.#window.lastRun; this.#run++) {
      if (merged.layer(this.#run) !== this.#window.layer) continue
      const runStart = merged.fileOffset(this.#run)
      const runEnd = runStart + merged.length(this.#run)
      const start = Math.max(runStart, blockStart)
      const end = Math.min(runEnd, blockEnd)
      if (start < end) {
        inFlight++
        bytes += end - start
        const data = slot.bytes.subarray(start - blockStart, end - blockStart)
        target.write(merged.start(this.#run) + start - runStart, data, { signal }).then(settled, failed)
      }
      if (runEnd > blockEnd) break
    }
    settled()
  }
}

/** The runs that read as zeros. */
function* zeroRuns(merged: LayeredExtents): Generator<number> {
  for (let run = 0; run < merged.count; run++) if (merged.layer(run) < 0) yield run
}
