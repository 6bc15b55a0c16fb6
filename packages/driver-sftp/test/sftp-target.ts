import { randomBytes } from 'node:crypto'
import { readdir, readFile, rm, stat } from 'node:fs/promises'
import { join, relative } from 'node:path'
import { SftpDriver, type SftpDriverOptions } from '@varve/driver-sftp'
import type { DriverTarget, RawObject } from '@varve/testkit'
import type { SshdLab } from '@varve/testkit/lab'

/** A driver on a new folder of a server, below `home`. What it stores is looked at on the server's disk. */
export async function sftpTarget(
  lab: SshdLab,
  options: Partial<SftpDriverOptions> = {},
  home = lab.home,
): Promise<DriverTarget & { path: string }> {
  const path = join(home, `storage-${randomBytes(4).toString('hex')}`)
  await lab.makeFolder(path)
  const driver = new SftpDriver({ ...(await login(lab)), pathPrefix: path, ...options })
  return {
    path,
    driver,
    inspect: () => filesIn(path),
    readRaw: name => readFile(join(path, name)),
    async dispose() {
      await driver[Symbol.asyncDispose]()
      await rm(path, { recursive: true })
      await rm(`${path}2`, { recursive: true, force: true })
    },
  }
}

/** What it takes to log in to the lab's server by a key. */
export async function login(lab: SshdLab): Promise<SftpDriverOptions & { port: number; hostKey: string }> {
  return {
    host: '127.0.0.1',
    port: lab.port,
    username: lab.username,
    privateKey: await readFile(lab.keyFile, 'utf8'),
    hostKey: await lab.fingerprint(),
  }
}

/** All that is below a folder and is no folder; folders that hold nothing, too, since none should stay. */
export async function filesIn(path: string): Promise<RawObject[]> {
  const entries = await readdir(path, { recursive: true, withFileTypes: true })
  const found = await Promise.all(
    entries.map(async entry => {
      const file = join(entry.parentPath, entry.name)
      const name = relative(path, file)
      if (!entry.isDirectory()) return [{ name, size: (await stat(file)).size }]
      return (await readdir(file)).length === 0 ? [{ name: `${name}/`, size: 0 }] : []
    }),
  )
  return found.flat()
}
