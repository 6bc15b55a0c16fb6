import { chmod, mkdtemp, rename, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { expect, onTestFinished, test, vi } from 'vitest'
import type { VarveEvent } from '../src/events.ts'
import { programVersion } from '../src/program-version.ts'

test('a program is asked for its version once, and again when its file or its place is another', async () => {
  const folder = await mkdtemp(join(tmpdir(), 'varve-version-'))
  onTestFinished(() => rm(folder, { recursive: true }))
  onTestFinished(() => void vi.unstubAllEnvs())
  vi.stubEnv('PATH', `${join(folder, 'none')}:${folder}:${process.env.PATH}`)
  const install = async (version: string) => {
    await writeFile(join(folder, 'new'), `#!/bin/sh\necho "varve-tool version ${version} (build 1)"\n`)
    await chmod(join(folder, 'new'), 0o755)
    await rename(join(folder, 'new'), join(folder, 'varve-tool'))
  }
  let starts = 0
  const onEvent = ({ type }: VarveEvent) => {
    if (type === 'command') starts++
  }
  const ask = () => programVersion('varve-tool', { onEvent })
  await install('7.2.11')
  expect([await ask(), await ask(), starts]).toEqual(['7.2.11', '7.2.11', 1])
  await install('7.2.12')
  expect([await ask(), await ask(), starts]).toEqual(['7.2.12', '7.2.12', 2])
  await rm(join(folder, 'varve-tool'))
  await expect(ask()).rejects.toMatchObject({ code: 'COMMAND_MISSING' })
})
