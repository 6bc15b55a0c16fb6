import { randomBytes } from 'node:crypto'
import { readdir, readFile, rm, stat } from 'node:fs/promises'
import { join, relative } from 'node:path'
import type { StorageDriver, StoredObject } from '@varve/core'
import { FtpDriver, type FtpDriverOptions } from '@varve/driver-ftp'
import type { DriverTarget, RawObject } from '@varve/testkit'
import { startVsftpd, type VsftpdLab, type VsftpdOptions } from '@varve/testkit/lab'
import { onTestFinished } from 'vitest'

/** The options that a driver of the lab's server needs. */
export async function optionsOf(
  lab: VsftpdLab,
  tls: 'explicit' | 'implicit' | 'none',
): Promise<FtpDriverOptions> {
  const { port, username, password } = lab
  const ca = tls === 'none' ? {} : { ca: await lab.certificate() }
  return { host: '127.0.0.1', port, username, password, tls, ...ca }
}

/** A driver on a new folder: below the home, or in another one that the user sees as it is. */
export async function ftpTarget(
  lab: VsftpdLab,
  options: FtpDriverOptions,
  elsewhere?: string,
): Promise<DriverTarget & { path: string }> {
  const name = `storage ${randomBytes(4).toString('hex')}`
  const path = join(elsewhere ?? lab.home, name)
  const seen = elsewhere === undefined ? name : path
  await lab.makeFolder(path)
  const driver = new FtpDriver({ ...options, pathPrefix: seen })
  return {
    path,
    driver,
    inspect: () => filesIn(path),
    readRaw: name => readFile(join(path, name)),
    async dispose() {
      await driver[Symbol.asyncDispose]()
      await rm(path, { recursive: true, force: true })
      await rm(`${path}2`, { recursive: true, force: true })
    },
  }
}

/** A driver of a server of its own, both for the test that runs. */
export async function begin(
  options: VsftpdOptions,
  more: Partial<FtpDriverOptions> = {},
): Promise<{ lab: VsftpdLab; driver: FtpDriver }> {
  const lab = await startVsftpd(options)
  onTestFinished(() => lab[Symbol.asyncDispose]())
  const driver = new FtpDriver({ ...(await optionsOf(lab, options.tls ?? 'none')), ...more })
  onTestFinished(() => driver[Symbol.asyncDispose]())
  return { lab, driver }
}

/** The commands that the server got, such as `STOR`, without what follows them. */
export async function commandsOf(lab: VsftpdLab): Promise<string[]> {
  return [...(await lab.log()).matchAll(/FTP command: Client "[^"]*", "(\w+)/g)].map(([, verb = '']) => verb)
}

/** What a driver lists. */
export async function listed(driver: StorageDriver, prefix = ''): Promise<StoredObject[]> {
  const objects: StoredObject[] = []
  for await (const object of driver.list(prefix)) objects.push(object)
  return objects
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
