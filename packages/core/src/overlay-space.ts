import { stat, statfs } from 'node:fs/promises'
import { dirname } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { errorMessage, VarveError } from './errors.ts'
import type { DiskOverlay } from './host.ts'
import { emit, type RunOptions } from './run-options.ts'
import { statIfThere } from './stat-if-there.ts'

/** How often the file systems are looked at, in milliseconds. */
const INTERVAL_MS = 500
/** See {@link defaultReserve}. */
const RESERVE_BYTES = 1024 ** 3
const RESERVE_SHARE = 0.05
/** The unit of `st_blocks`, see inode(7). */
const BLOCK_BYTES = 512

/** An overlay and the size of its disk. */
export interface SizedOverlay extends DiskOverlay {
  /** In bytes. */
  readonly virtualSize: number
}

/**
 * Tells which file system is about to be full: where the overlays grow, or where their bases are to take up what the
 * overlays hold. A guest whose overlay finds no room is stopped by its first write, and a commit that finds none
 * fails, so a backup is given up before either.
 *
 * @param reserve bytes to keep free; default: 1 GiB, or 5 % of a smaller file system
 * @returns OVERLAY_SPACE_LOW, or undefined where there is room
 * @throws OVERLAY_SPACE_LOW where that cannot be told
 */
export async function lackOfSpace(
  overlays: readonly SizedOverlay[],
  reserve: number | undefined,
): Promise<VarveError | undefined> {
  try {
    return await findLack(overlays, reserve)
  } catch (error) {
    throw new VarveError(
      'OVERLAY_SPACE_LOW',
      `How much room the overlays have cannot be told: ${errorMessage(error)}. See that the folders of the disks and of their overlays can be read, and back up again.`,
      { cause: error, retryable: true },
    )
  }
}

async function findLack(
  overlays: readonly SizedOverlay[],
  reserve: number | undefined,
): Promise<VarveError | undefined> {
  const needs = new Map<number, { folder: string; growth: number }>()
  const need = async (folder: string, growth: number) => {
    const { dev } = await stat(folder)
    needs.set(dev, { folder, growth: (needs.get(dev)?.growth ?? 0) + growth })
  }
  for (const overlay of overlays) {
    await need(dirname(overlay.overlay), 0)
    const growth = await growthOfBase(overlay)
    if (growth > 0) await need(dirname(overlay.base), growth)
  }
  for (const { folder, growth } of needs.values()) {
    const { bavail, blocks, bsize } = await statfs(folder)
    const free = bavail * bsize
    const kept = reserve ?? defaultReserve(blocks * bsize)
    if (free >= growth + kept) continue
    return new VarveError(
      'OVERLAY_SPACE_LOW',
      `The file system of ${folder} has ${free} bytes left, and the guest's writes during a backup need ${growth + kept}: ${growth} to merge them back, and ${kept} that are kept free. The backup was given up before the guest had to stop, and what it wrote meanwhile is merged back. Make room, put the overlays elsewhere (overlayFolder), keep less free (overlayReserve), or back up when the guest writes less.`,
      { context: { folder, free, needed: growth + kept }, retryable: true },
    )
  }
  return undefined
}

/** What is kept free by default of a file system of this size, both in bytes. */
export function defaultReserve(size: number): number {
  return Math.min(RESERVE_BYTES, Math.floor(size * RESERVE_SHARE))
}

/** What a base may grow by when its overlay is merged into it. A block device does not. */
async function growthOfBase({ base, overlay, virtualSize }: SizedOverlay): Promise<number> {
  const [written, whole] = await Promise.all([statIfThere(overlay), stat(base)])
  if (!whole.isFile()) return 0
  const left = Math.max(0, virtualSize - whole.blocks * BLOCK_BYTES)
  return Math.min((written?.blocks ?? 0) * BLOCK_BYTES, left)
}

/** Watches the space of overlays that are in use. Its signal is aborted, with the error as the reason, when that ends. */
export class OverlayWatch implements AsyncDisposable {
  readonly #lack = new AbortController()
  readonly #end = new AbortController()
  readonly #watching: Promise<void>

  constructor(overlays: readonly SizedOverlay[], reserve: number | undefined, run: RunOptions) {
    this.#watching = overlays.length === 0 ? Promise.resolve() : this.#watch(overlays, reserve, run)
  }

  get signal(): AbortSignal {
    return this.#lack.signal
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#end.abort()
    await this.#watching
  }

  async #watch(
    overlays: readonly SizedOverlay[],
    reserve: number | undefined,
    run: RunOptions,
  ): Promise<void> {
    let warned = false
    while (!this.#end.signal.aborted) {
      const lack = await lackOfSpace(overlays, reserve).catch(error => {
        if (!warned) emit(run, { type: 'warning', message: errorMessage(error) })
        warned = true
        return undefined
      })
      if (lack) return this.#lack.abort(lack)
      await sleep(INTERVAL_MS, undefined, { signal: this.#end.signal, ref: false }).catch(() => undefined) // at the end
    }
  }
}
