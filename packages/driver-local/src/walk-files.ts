import type { Stats } from 'node:fs'
import { lstat, readdir } from 'node:fs/promises'
import type { Folder } from './folder.ts'
import { unlessMissing } from './local-error.ts'

/** Entries of a folder that are looked up at once. */
const BATCH = 64

/** A file that {@link walkFiles} found. */
export interface FoundFile {
  /** Its path below the folder where the walk began. */
  readonly path: string
  readonly stats: Stats
}

interface Entry {
  readonly name: string
  readonly stats: Stats
}

/** Options of {@link walkFiles}. */
export interface WalkFilesOptions {
  /** Put before each path. */
  base: string
  /** Whether to enter a folder. */
  enters: (path: string) => boolean
  /** Whether to give a file. */
  takes: (path: string) => boolean
}

/**
 * The plain files in a folder and in those below it, as they are found: what comes and goes meanwhile may or
 * may not be among them. Symbolic links are neither given nor followed.
 */
export async function* walkFiles(folder: Folder, options: WalkFilesOptions): AsyncGenerator<FoundFile> {
  const { base, enters, takes } = options
  const names = await namesIn(folder)
  const wanted = names.filter(name => takes(`${base}${name}`) || enters(`${base}${name}`))
  for (let first = 0; first < wanted.length; first += BATCH) {
    for (const { name, stats } of await entriesOf(folder, wanted.slice(first, first + BATCH))) {
      const path = `${base}${name}`
      if (stats.isFile() && takes(path)) yield { path, stats }
      const within = { ...options, base: `${path}/` }
      if (stats.isDirectory() && enters(path)) yield* filesBelow(folder, name, within)
    }
  }
}

/**
 * Names alone: for the type of an entry, where the file system does not give it with the name, Node asks in the main
 * thread, and fails with `ENOENT` where the entry has gone by then.
 */
async function namesIn(folder: Folder): Promise<string[]> {
  // the system has no entries of a folder, not even none, that was removed since it was opened
  return (await unlessMissing(folder.call(() => readdir(folder.path)))) ?? []
}

async function* filesBelow(
  folder: Folder,
  name: string,
  options: WalkFilesOptions,
): AsyncGenerator<FoundFile> {
  await using inner = await unlessMissing(folder.enter(name))
  if (inner) yield* walkFiles(inner, options)
}

async function entriesOf(folder: Folder, names: readonly string[]): Promise<Entry[]> {
  const found = await Promise.all(
    names.map(async name => {
      const stats = await unlessMissing(folder.call(() => lstat(folder.at(name))))
      return stats ? [{ name, stats }] : []
    }),
  )
  return found.flat()
}
