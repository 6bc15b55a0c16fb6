import { chmod, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { CommandEvent, StorageDriver } from '@varve/core'
import { onTestFinished } from 'vitest'
import { folderTarget } from './rclone-target.ts'

/** Never resolves. */
export const never = new Promise<never>(() => undefined)

/** A driver on a folder of its own, for one test, which is told the commands that it runs. */
export async function begin(options: Parameters<typeof folderTarget>[1] = {}) {
  const commands: CommandEvent[] = []
  const target = await folderTarget(undefined, { onCommand: event => commands.push(event), ...options })
  onTestFinished(() => target.dispose())
  return { ...target, commands }
}

/** A program in rclone's place: what `script` says, and otherwise rclone itself. */
export async function scriptFile(script: string): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), 'varve-rclone-script-'))
  onTestFinished(() => rm(folder, { recursive: true }))
  const command = join(folder, 'rclone')
  await writeFile(command, `#!/bin/sh\n${script}\nexec rclone "$@"\n`)
  await chmod(command, 0o755)
  return command
}

/** A driver on a folder of its own whose rclone is a {@link scriptFile}. */
export async function beginWithScript(script: string, options: Parameters<typeof folderTarget>[1] = {}) {
  return begin({ command: await scriptFile(script), ...options })
}

/** The processes of this one's children that run rclone. */
export async function rcloneProcesses(): Promise<number[]> {
  const children = await readFile(`/proc/self/task/${process.pid}/children`, 'utf8')
  const found: number[] = []
  for (const pid of children.split(' ').filter(Boolean)) {
    const name = await readFile(`/proc/${pid}/comm`, 'utf8').catch(() => '')
    if (name.trim() === 'rclone') found.push(Number(pid))
  }
  return found
}

/** What a driver lists. */
export async function listed(driver: StorageDriver, prefix: string): Promise<string[]> {
  const keys: string[] = []
  for await (const { key } of driver.list(prefix)) keys.push(key)
  return keys
}
