import { mkdir, mkdtemp, readdir, readFile, rm, stat, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { basename, dirname, join, relative } from 'node:path'
import { RcloneDriver, type RcloneDriverOptions } from '@varve/driver-rclone'
import type { DriverTarget, RawObject } from '@varve/testkit'

/** A driver on a folder, the folder, and the configuration file of its remote `nas`, for the folder above. */
export interface FolderTarget extends DriverTarget {
  readonly path: string
  readonly configFile: string
}

/** A driver on a folder of this machine, which rclone reaches by a remote of its configuration file. */
export async function folderTarget(
  folder?: string,
  options: Partial<RcloneDriverOptions> = {},
): Promise<FolderTarget> {
  const home = await mkdtemp(join(tmpdir(), 'varve-rclone-'))
  const root = folder ?? home
  const path = join(root, 'backup')
  const configFile = join(home, 'rclone.conf')
  await mkdir(path)
  await writeFile(configFile, `[nas]\ntype = alias\nremote = ${root}\n`)
  return {
    path,
    configFile,
    driver: new RcloneDriver({ remoteName: 'nas', configFile, pathPrefix: 'backup', ...options }),
    inspect: () => filesIn(path),
    readRaw: name => readFile(join(path, name)),
    async writeRaw(key, bytes) {
      await mkdir(join(path, dirname(key)), { recursive: true })
      await writeFile(join(path, key), bytes)
    },
    isUnfinished: name => basename(name).startsWith('.varve-part-'),
    async dispose() {
      await rm(path, { recursive: true })
      await rm(home, { recursive: true })
    },
  }
}

/** Writes each key into a file of that name below a folder. */
export async function fillFolder(path: string, keys: readonly string[]): Promise<void> {
  for (const key of keys) {
    await mkdir(join(path, dirname(key)), { recursive: true })
    await writeFile(join(path, key), key)
  }
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
