import { mkdir } from 'node:fs/promises'
import { dirname } from 'node:path'

/**
 * Makes a folder for its owner only, with its parents, and resolves with those that were missing, the topmost first.
 * It goes up to the first parent that is there, and down again once: `mkdir` with `recursive` never ends where the
 * kernel says `ENOENT` although the parent is there, as in /proc.
 *
 * @throws the file system's own error
 */
export async function makeFolders(path: string): Promise<string[]> {
  const made: string[] = []
  const missing: string[] = []
  for (let folder = path; ; folder = dirname(folder)) {
    try {
      if (await makeFolder(folder)) made.push(folder)
      break
    } catch (error) {
      if (!hasCode(error, 'ENOENT') || folder === dirname(folder)) throw error
      missing.unshift(folder)
    }
  }
  for (const folder of missing) if (await makeFolder(folder)) made.push(folder)
  return made
}

/** Resolves with whether it was missing. */
async function makeFolder(path: string): Promise<boolean> {
  try {
    await mkdir(path, 0o700)
    return true
  } catch (error) {
    if (hasCode(error, 'EEXIST')) return false
    throw error
  }
}

function hasCode(error: unknown, code: string): boolean {
  return error instanceof Error && 'code' in error && error.code === code
}
