import { mkdir, mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { onTestFinished } from 'vitest'

/** An empty folder for a storage, and one beside it that a driver must never touch; both for one test. */
export async function temporaryStorage(): Promise<{ path: string; outside: string }> {
  const home = await mkdtemp(join(tmpdir(), 'varve-local-'))
  onTestFinished(() => rm(home, { recursive: true }))
  const path = join(home, 'storage')
  const outside = join(home, 'outside')
  await mkdir(path)
  await mkdir(outside)
  return { path, outside }
}
