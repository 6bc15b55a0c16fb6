import { chmod, mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { Readable } from 'node:stream'
import { bytesBody, type CommandEvent } from '@varve/core'
import { RcloneDriver } from '@varve/driver-rclone'
import { expect, onTestFinished, test } from 'vitest'
import { folderTarget } from './rclone-target.ts'

/** A program of its own path that is rclone but for the version that it tells. */
async function rcloneOf(version: string): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), 'varve-rclone-version-'))
  onTestFinished(() => rm(folder, { recursive: true }))
  const command = join(folder, 'rclone')
  const script = `case "$1" in version) echo "rclone v${version}"; exit;; esac`
  await writeFile(command, `#!/bin/sh\n${script}\nexec rclone "$@"\n`)
  await chmod(command, 0o755)
  return command
}

async function begin(version: string) {
  const commands: CommandEvent[] = []
  const onCommand = (event: CommandEvent) => commands.push(event)
  const command = await rcloneOf(version)
  const target = await folderTarget(undefined, { command, onCommand })
  onTestFinished(() => target.dispose())
  const other = () =>
    new RcloneDriver({
      remoteName: 'nas',
      configFile: target.configFile,
      pathPrefix: 'backup',
      command,
      onCommand,
    })
  const asked = () => commands.filter(({ args }) => args[0] === 'version').length
  return { ...target, commands, other, asked }
}

test('an rclone that is too old, but works, uploads nothing', async () => {
  const { driver, inspect, commands } = await begin('1.58.1')
  const tooOld = { code: 'INVALID_CONFIG', message: expect.stringMatching(/1\.58\.1.*1\.59\.0/) }
  await expect(driver.put('a', bytesBody(Buffer.from('x')))).rejects.toMatchObject(tooOld)
  const source = Readable.from([Buffer.from('x')])
  await expect(driver.put('b', source)).rejects.toMatchObject(tooOld)
  expect(source.destroyed).toBe(true)
  expect(await inspect()).toEqual([])
  expect(commands.map(({ args }) => args[0])).not.toContain('rcat')
})

test('the version is asked for before the first upload of a program, and not again', async () => {
  const { driver, other, asked, commands } = await begin('1.59.0')
  await driver.put('a', bytesBody(Buffer.from('x')))
  await driver.put('b', bytesBody(Buffer.from('x')))
  await other().put('c', bytesBody(Buffer.from('x')))
  expect(asked()).toBe(1)
  expect(commands[0]?.args[0]).toBe('version')
})
