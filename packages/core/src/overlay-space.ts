import { open, stat, statfs } from 'node:fs/promises'
import { dirname } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { errorMessage, VarveError } from './errors.ts'
import { unlessAborted } from './giving-up.ts'
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
/** Where a qcow2 header has the number of internal snapshots, 4 bytes with the highest first. */
const SNAPSHOT_COUNT_AT = 60

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
  return findLack(overlays, reserve).catch(error => {
    throw unknownSpace(error)
  })
}

function unknownSpace(cause: unknown): VarveError {
  return new VarveError(
    'OVERLAY_SPACE_LOW',
    `How much room the overlays have cannot be told: ${errorMessage(cause)}. See that the folders of the disks and of their overlays can be read, and back up again.`,
    { cause, retryable: true },
  )
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
    const { free, kept } = await spaceOf(folder, reserve)
    if (free >= growth + kept) continue
    return new VarveError(
      'OVERLAY_SPACE_LOW',
      `The file system of ${folder} has ${free} bytes left, and the guest's writes during a backup need ${growth + kept}: ${growth} to merge them back, and ${kept} that are kept free. The backup was given up before the guest had to stop, and what it wrote meanwhile is merged back. Make room, put the overlays elsewhere (overlayFolder), keep less free (overlayReserve), or back up when the guest writes less.`,
      { context: { folder, free, needed: growth + kept }, retryable: true },
    )
  }
  return undefined
}

/** What a file system has left, and what of it is kept free, both in bytes. */
async function spaceOf(folder: string, reserve: number | undefined): Promise<{ free: number; kept: number }> {
  const { bavail, blocks, bsize } = await statfs(folder)
  return { free: bavail * bsize, kept: reserve ?? defaultReserve(blocks * bsize) }
}

/** What is kept free by default of a file system of this size, both in bytes. */
export function defaultReserve(size: number): number {
  return Math.min(RESERVE_BYTES, Math.floor(size * RESERVE_SHARE))
}

/**
 * What a base may grow by when its overlay is merged into it: by no more than it lacks of its disk, unless internal snapshots
 * keep the clusters that are written anew. A block device does not grow.
 */
async function growthOfBase({ base, baseFormat, overlay, virtualSize }: SizedOverlay): Promise<number> {
  const [written, whole] = await Promise.all([statIfThere(overlay), statIfThere(base)])
  if (!whole?.isFile()) return 0
  const held = (written?.blocks ?? 0) * BLOCK_BYTES
  if (baseFormat === 'qcow2' && (await hasInternalSnapshots(base))) return held
  return Math.min(held, Math.max(0, virtualSize - whole.blocks * BLOCK_BYTES))
}

async function hasInternalSnapshots(image: string): Promise<boolean> {
  await using file = await open(image)
  const { buffer } = await file.read(Buffer.alloc(4), 0, 4, SNAPSHOT_COUNT_AT)
  return buffer.readUInt32BE() > 0
}

/** Looks at the space of file systems until there is too little of it somewhere, or it is told to end. */
class SpaceWatch implements AsyncDisposable {
  readonly #end = new AbortController()
  readonly #watching: Promise<void>

  /** @param find an error that tells where there is too little; rejects where that cannot be told */
  constructor(
    find: () => Promise<VarveError | undefined>,
    onLack: (lack: VarveError) => void,
    run: RunOptions,
  ) {
    this.#watching = this.#watch(find, onLack, run)
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#end.abort()
    await this.#watching
  }

  async #watch(
    find: () => Promise<VarveError | undefined>,
    onLack: (lack: VarveError) => void,
    run: RunOptions,
  ): Promise<void> {
    const { signal } = this.#end
    let warned = false
    while (!signal.aborted) {
      // At the end it is not waited for: a mount that hangs may never answer.
      const lack = await unlessAborted(find(), signal).catch(error => {
        if (!warned && !signal.aborted) emit(run, { type: 'warning', message: errorMessage(error) })
        warned = true
        return undefined
      })
      if (lack) return onLack(lack)
      await sleep(INTERVAL_MS, undefined, { signal, ref: false }).catch(() => undefined) // at the end
    }
  }
}

/** Watches the space of overlays that are in use. */
export class OverlayWatch implements AsyncDisposable {
  readonly #lack = new AbortController()
  readonly #watch: SpaceWatch | undefined

  constructor(overlays: readonly SizedOverlay[], reserve: number | undefined, run: RunOptions) {
    if (overlays.length === 0) return
    this.#watch = new SpaceWatch(
      () => lackOfSpace(overlays, reserve),
      lack => this.#lack.abort(lack),
      run,
    )
  }

  /** Does `work`, and gives it up where the space runs low: what is lacking is thrown once it has ended. */
  async during<T>(given: AbortSignal | undefined, work: (signal: AbortSignal) => Promise<T>): Promise<T> {
    const lack = this.#lack.signal
    try {
      return await work(given ? AbortSignal.any([given, lack]) : lack)
    } catch (error) {
      throw lack.aborted && !given?.aborted ? lack.reason : error
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#watch?.[Symbol.asyncDispose]()
  }
}

/** Warns, once, where the space runs low while overlays are merged back: there is nothing then to give up. */
export function watchMerge(
  overlays: readonly DiskOverlay[],
  reserve: number | undefined,
  run: RunOptions,
): AsyncDisposable {
  const warn = ({ message }: VarveError) => emit(run, { type: 'warning', message })
  return new SpaceWatch(() => lackWhileMerged(overlays, reserve), warn, run)
}

/** The bases grow while the overlays are merged, as far as they have to: only what is to stay free is looked at. */
async function lackWhileMerged(
  overlays: readonly DiskOverlay[],
  reserve: number | undefined,
): Promise<VarveError | undefined> {
  const folders = overlays.flatMap(({ base, overlay }) => [dirname(overlay), dirname(base)])
  for (const folder of new Set(folders)) {
    const { free, kept } = await spaceOf(folder, reserve).catch(error => {
      throw unknownSpace(error)
    })
    if (free >= kept) continue
    return new VarveError(
      'OVERLAY_SPACE_LOW',
      `The file system of ${folder} has ${free} bytes left while the guest's writes are merged back, less than the ${kept} that are kept free. Make room there now: a guest that finds none to write to is stopped, and what cannot be merged stays in its overlay.`,
      { context: { folder, free, needed: kept }, retryable: true },
    )
  }
  return undefined
}
