import type { FileHandle } from 'node:fs/promises'
import { z } from 'zod'
import { runCommand } from './command.ts'
import { ImageMap } from './image-map.ts'
import type { RunOptions } from './run-options.ts'

/** Enough for the map of a large and scattered image. */
const TIMEOUT_MS = 10 * 60_000

/** Runs that a map has at most: 6 MiB of memory for each disk, and 16 GiB of one whose clusters of 64 KiB are all scattered. */
export const MOST_RUNS = 262_144

/** QEMU's qcow2 specification, "Header". */
const MAGIC = 0x514649fb
const HEADER_BYTES = 80
/** Incompatible features that leave the data in the file: dirty (0), compression type (3), extended L2 (4). */
const DATA_STAYS = 0b11001

/** A line of `qemu-img map --output=json`; QAPI reference, "MapEntry". */
const mapEntry = z.object({
  start: z.number().int().nonnegative(),
  length: z.number().int().nonnegative(),
  /** 0 is the image itself, 1 its backing file, and so on. */
  depth: z.number().int().nonnegative(),
  /** False for a zero cluster, also for one that has space in the file, which may hold anything. */
  data: z.boolean(),
  /** Absent for what is compressed or encrypted. */
  offset: z.number().int().nonnegative().optional(),
})

/** Options of {@link readImageMap}. */
export interface ImageMapOptions extends RunOptions {
  /** Runs after which the map ends. Default: {@link MOST_RUNS}. */
  readonly mostRuns?: number | undefined
}

/**
 * Where a qcow2 image that nobody writes to holds its disk's bytes as they are, as QEMU sees it. Nothing is where
 * it cannot be sure: in an external data file, with a feature that is not known here, or behind the last run of a map that
 * has as many as it may have.
 *
 * @param file the image at `path`, open
 * @throws COMMAND_FAILED and the like
 */
export async function readImageMap(
  file: FileHandle,
  path: string,
  { mostRuns = MOST_RUNS, ...run }: ImageMapOptions,
): Promise<ImageMap> {
  const map = new ImageMap()
  if (!(await holdsItsData(file))) return map
  const full = new AbortController() // qemu-img would go on for millions of lines
  const signal = run.signal ? AbortSignal.any([run.signal, full.signal]) : full.signal
  const reading = runCommand('qemu-img', ['map', '--output=json', '-f', 'qcow2', path], {
    ...run,
    signal,
    timeoutMs: TIMEOUT_MS,
    onLine: line => {
      if (full.signal.aborted) return
      // One array, with an entry to a line.
      const text = line.replace(/^\[/, '').replace(/[,\]]$/, '')
      if (text === '') return
      const { start, length, depth, data, offset } = mapEntry.parse(JSON.parse(text))
      if (!data || depth !== 0 || offset === undefined) return
      map.append(start, length, offset)
      if (map.count === mostRuns) full.abort()
    },
  })
  await reading.catch(error => {
    if (!full.signal.aborted) throw error
  })
  return map
}

/** Offsets in QEMU's map are those of the external data file, where there is one, and the map does not tell. */
async function holdsItsData(file: FileHandle): Promise<boolean> {
  const header = Buffer.alloc(HEADER_BYTES)
  const { bytesRead } = await file.read(header, 0, HEADER_BYTES, 0)
  if (bytesRead < HEADER_BYTES || header.readUInt32BE(0) !== MAGIC) return false
  if (header.readUInt32BE(4) === 2) return true // has no such features
  return header.readUInt32BE(72) === 0 && (header.readUInt32BE(76) & ~DATA_STAYS) === 0
}
