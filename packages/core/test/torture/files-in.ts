import { readdir } from 'node:fs/promises'
import { join, relative } from 'node:path'

/** The paths of all that is in a folder and those below it, but for the folders themselves. */
export async function filesIn(folder: string): Promise<string[]> {
  const entries = await readdir(folder, { recursive: true, withFileTypes: true })
  return entries
    .filter(entry => !entry.isDirectory())
    .map(entry => relative(folder, join(entry.parentPath, entry.name)))
}
