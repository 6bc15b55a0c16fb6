import type { Stats } from 'node:fs'
import { stat } from 'node:fs/promises'

/** What is at a path, or undefined where nothing is; every other error is thrown. */
export async function statIfThere(path: string): Promise<Stats | undefined> {
  try {
    return await stat(path)
  } catch (error) {
    const code = error instanceof Error && 'code' in error ? error.code : undefined
    if (code === 'ENOENT' || code === 'ENOTDIR') return undefined
    throw error
  }
}
