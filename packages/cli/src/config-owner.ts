import type { Stats } from 'node:fs'
import { type FileHandle, lstat, stat } from 'node:fs/promises'
import { dirname } from 'node:path'
import { VarveError } from '@varve/core'

/**
 * Refuses a configuration where another user than root and the caller could have put it there. To be called before it
 * is opened: a pipe of somebody else would never open.
 *
 * @throws INVALID_CONFIG; ENOENT where there is none
 */
export async function assertOwnPlace(path: string): Promise<void> {
  assertOwn(path, path, await lstat(path)) // a symbolic link itself
  const folder = dirname(path)
  assertOwn(path, folder, await stat(folder))
}

/**
 * The same for the file that was opened, which a symbolic link may have led to.
 *
 * @throws INVALID_CONFIG
 */
export async function assertOwnFile(path: string, file: FileHandle): Promise<void> {
  assertOwn(path, path, await file.stat())
}

function assertOwn(path: string, place: string, stats: Stats): void {
  const why = whyForeign(stats)
  if (why === undefined) return
  throw new VarveError(
    'INVALID_CONFIG',
    `The configuration ${path} is not used, since ${place} ${why}. If you trust it, name it with --config or VARVE_CONFIG. Else go to another folder.`,
    { context: { path, place } },
  )
}

function whyForeign(stats: Stats): string | undefined {
  if (stats.uid !== 0 && stats.uid !== process.geteuid?.()) return `belongs to the user ${stats.uid}`
  const isSticky = stats.isDirectory() && (stats.mode & 0o1000) !== 0 // nobody else can replace a file in it
  if (stats.isSymbolicLink() || isSticky || (stats.mode & 0o022) === 0) return undefined
  return 'can be written to by other users (chmod go-w)'
}
