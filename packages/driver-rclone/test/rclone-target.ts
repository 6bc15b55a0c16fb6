import { mkdir, mkdtemp, readdir, readFile, rm, stat, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join, relative } from 'node:path'
import { RcloneDriver, type RcloneDriverOptions } from '@varve/driver-rclone'
import type { DriverTarget, RawObject } from '@varve/testkit'

/** A driver on a folder of this machine, which rclone reaches by a remote of its configuration file. */
export async function folderTarget(
  folder?: string,
  options: Partial<RcloneDriverOptions> = {},
): Promise<DriverTarget & { path: string; configFile: string }> {
  const home = await mkdtemp(join(tmpdir(), 'varve-rclone-'))
  const root = folder ?? home
  const path = join(root, 'backup')
  const configFile = join(home, 'rclone.conf')
  await mkdir(path)
  await writeFile(configFile, `[nas]\ntype = alias\nremote = ${root}\n`)
  const driverOf = (pathPrefix: string) =>
    new RcloneDriver({ remoteName: 'nas', configFile, pathPrefix, ...options })
  return {
    path,
    configFile,
    driver: driverOf('backup'),
    inspect: () => filesIn(path),
    readRaw: name => readFile(join(path, name)),
    async leaveUnfinished() {
      await mkdir(join(path, 'killed'))
      await writeFile(join(path, 'killed/.varve-part-0123456789abcdef'), 'half')
    },
    async neighbour() {
      await mkdir(`${path}2`)
      return driverOf('backup2')
    },
    async dispose() {
      await rm(path, { recursive: true })
      await rm(home, { recursive: true })
    },
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
