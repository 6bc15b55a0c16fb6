import type { LayeredExtents } from '@varve/qcow2'

/** Blocks of one layer that are downloaded together, and the runs of the disk that are in them. */
export interface RestoreWindow {
  /** Index of the layer. */
  readonly layer: number
  /** The first block, and the one after the last. */
  readonly firstBlock: number
  readonly endBlock: number
  /** The first run in them, and the last; runs of other layers lie between. */
  readonly firstRun: number
  readonly lastRun: number
}

/** How to cut a disk into windows. */
export interface WindowOptions {
  /** Bytes in each block, of every layer. */
  readonly blockSizes: readonly number[]
  /** The most blocks in one window. */
  readonly maxBlocks: number
  /** The most blocks that nobody needs between two in one window. */
  readonly maxGap: number
}

/**
 * Everything of a disk that has to be downloaded, layer by layer and in the order of each layer's file, which
 * is the guest's order. No block is in two windows.
 */
export function* restoreWindows(merged: LayeredExtents, options: WindowOptions): Generator<RestoreWindow> {
  const { blockSizes, maxBlocks, maxGap } = options
  for (const [layer, blockSize] of blockSizes.entries()) {
    let window: { -readonly [K in keyof RestoreWindow]: RestoreWindow[K] } | undefined
    for (let run = 0; run < merged.count; run++) {
      if (merged.layer(run) !== layer) continue
      const start = merged.fileOffset(run)
      const end = Math.ceil((start + merged.length(run)) / blockSize)
      for (let block = Math.floor(start / blockSize); block < end; ) {
        if (window && block <= window.endBlock + maxGap && block - window.firstBlock < maxBlocks) {
          window.endBlock = Math.max(window.endBlock, Math.min(end, window.firstBlock + maxBlocks))
          window.lastRun = run
          block = window.endBlock
        } else {
          if (window) yield window
          window = { layer, firstBlock: block, endBlock: block + 1, firstRun: run, lastRun: run }
          block++
        }
      }
    }
    if (window) yield window
  }
}
