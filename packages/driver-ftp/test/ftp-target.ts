import { readdir, readFile, rm, stat, writeFile } from 'node:fs/promises'
import { join, relative } from 'node:path'
import { FtpDriver, type FtpDriverOptions } from '@varve/driver-ftp'
import type { DriverTarget, RawObject } from '@varve/testkit'
import type { VsftpdLab } from '@varve/testkit/lab'

let targets = 0

/** The options that a driver of the lab's server needs. */
export async function optionsOf(
  lab: VsftpdLab,
  tls: 'explicit' | 'implicit' | 'none',
): Promise<FtpDriverOptions> {
  const { port, username, password } = lab
  return {
    host: '127.0.0.1',
    port,
    username,
    password,
    tls,
    ...(tls === 'none' ? {} : { ca: await lab.certificate() }),
  }
}

/** A driver on a folder of its own, below the home or at `folder`, which is then removed. */
export async function ftpTarget(
  lab: VsftpdLab,
  options: FtpDriverOptions,
  folder: string = `storage ${++targets}`,
): Promise<DriverTarget & { path: string }> {
  const path = join(lab.home, folder)
  await lab.makeFolder(path)
  const driver = new FtpDriver({ ...options, pathPrefix: folder })
  let neighbour: FtpDriver | undefined
  return {
    path,
    driver,
    inspect: () => filesIn(path),
    readRaw: name => readFile(join(path, name)),
    async leaveUnfinished() {
      await lab.makeFolder(join(path, 'killed'))
      await writeFile(join(path, 'killed/.varve-part-0123456789abcdef'), 'half')
    },
    async neighbour() {
      await lab.makeFolder(`${path}2`)
      neighbour = new FtpDriver({ ...options, pathPrefix: `${folder}2` })
      return neighbour
    },
    async dispose() {
      await driver[Symbol.asyncDispose]()
      await neighbour?.[Symbol.asyncDispose]()
      await rm(path, { recursive: true, force: true })
      await rm(`${path}2`, { recursive: true, force: true })
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
