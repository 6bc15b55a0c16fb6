import type { Dirent, Stats } from 'node:fs'
import { lstat, opendir } from 'node:fs/promises'
import { fileCall } from './file-call.ts'
import type { Folder } from './folder.ts'
import { isMissing } from './local-error.ts'

/** Entries of a folder whose sizes are asked for at once. */
const BATCH = 64

/** A file that {@link walkFiles} found. */
export interface FoundFile {
  /** Its path below the folder where the walk began. */
  readonly path: string
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
  let batch: string[] = []
  for await (const entry of entriesOf(folder)) {
    const path = `${base}${entry.name}`
    if (entry.isDirectory() && enters(path)) {
      yield* filesBelow(folder, entry.name, { ...options, base: `${path}/` })
    } else if (entry.isFile() && takes(path)) {
      batch.push(entry.name)
      if (batch.length === BATCH) {
        yield* await filesOf(folder, base, batch)
        batch = []
      }
    }
  }
  yield* await filesOf(folder, base, batch)
}

async function* entriesOf(folder: Folder): AsyncGenerator<Dirent> {
  const entries = await folder.call(() => opendir(folder.path, { bufferSize: BATCH }))
  try {
    for (;;) {
      const entry = await folder.call(() => entries.read())
      if (!entry) return
      yield entry
    }
  } finally {
    await fileCall(() => entries.close())
  }
}

async function* filesBelow(
  folder: Folder,
  name: string,
  options: WalkFilesOptions,
): AsyncGenerator<FoundFile> {
  await using inner = await unlessMissing(folder.enter(name))
  if (inner) yield* walkFiles(inner, options)
}

async function filesOf(folder: Folder, base: string, names: readonly string[]): Promise<FoundFile[]> {
  const found = await Promise.all(
    names.map(async name => {
      const stats = await unlessMissing(folder.call(() => lstat(folder.at(name))))
      return stats?.isFile() ? [{ path: `${base}${name}`, stats }] : []
    }),
  )
  return found.flat()
}

async function unlessMissing<T>(promise: Promise<T>): Promise<T | undefined> {
  try {
    return await promise
  } catch (error) {
    if (isMissing(error)) return undefined
    throw error
  }
}
