import { constants } from 'node:fs'
import { access, stat } from 'node:fs/promises'
import { delimiter, join } from 'node:path'
import { runCommand } from './command.ts'
import type { RunOptions } from './run-options.ts'

/** By {@link identityOf}. */
const known = new Map<string, string>()

/** The version that a program tells of itself. One whose file is as it was is not started for it again. */
export async function programVersion(program: string, run: RunOptions = {}): Promise<string> {
  const identity = await identityOf(program)
  const told = identity === undefined ? undefined : known.get(identity)
  if (told !== undefined) return told
  const { stdout } = await runCommand(program, ['--version'], run)
  const version = /\d+\.\d+\.\d+/.exec(stdout)?.[0] ?? 'unknown'
  if (identity !== undefined) known.set(identity, version)
  return version
}

/** What tells the file that would be started from any other, and from itself before an update. */
async function identityOf(program: string): Promise<string | undefined> {
  for (const folder of (process.env.PATH ?? '').split(delimiter)) {
    const path = join(folder, program)
    try {
      await access(path, constants.X_OK)
      const file = await stat(path)
      if (file.isFile()) return [path, file.dev, file.ino, file.size, file.mtimeMs, file.ctimeMs].join(' ')
    } catch {
      // the next folder may have it
    }
  }
  return undefined
}
