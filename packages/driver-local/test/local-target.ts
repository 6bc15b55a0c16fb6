import { mkdir, mkdtemp, readdir, readFile, rm, stat, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join, relative } from 'node:path'
import { LocalDriver } from '@varve/driver-local'
import type { DriverTarget, RawObject } from '@varve/testkit'

/** A driver on a folder, and the folder. */
export interface LocalTarget extends DriverTarget {
  readonly path: string
}

/** A driver on a folder of its own, or on the one that is given, which stays. */
export async function localTarget(folder?: string): Promise<LocalTarget> {
  const home = folder ?? (await mkdtemp(join(tmpdir(), 'varve-local-')))
  const path = join(home, 'storage')
  await mkdir(path)
  return {
    path,
    driver: new LocalDriver({ path }),
    inspect: () => filesIn(path),
    readRaw: name => readFile(join(path, name)),
    dispose: () => rm(folder === undefined ? home : path, { recursive: true }),
  }
}

/** What a killed upload leaves. */
export async function leaveUnfinished({ path }: LocalTarget): Promise<void> {
  await mkdir(join(path, 'killed'))
  await writeFile(join(path, 'killed/.varve-part-0123456789abcdef'), 'half')
}

/** A driver on a folder whose name begins with that of a target's. */
export async function neighbour({ path }: LocalTarget): Promise<LocalDriver> {
  await mkdir(`${path}2`)
  return new LocalDriver({ path: `${path}2` })
}

/** All files below a folder. */
export async function filesIn(path: string): Promise<RawObject[]> {
  const entries = await readdir(path, { recursive: true, withFileTypes: true })
  return Promise.all(
    entries
      .filter(entry => !entry.isDirectory())
      .map(async entry => {
        const file = join(entry.parentPath, entry.name)
        return { name: relative(path, file), size: (await stat(file)).size }
      }),
  )
}
