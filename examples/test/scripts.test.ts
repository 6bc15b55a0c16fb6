import { access, chmod, constants, mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join, relative } from 'node:path'
import { fileURLToPath } from 'node:url'
import { execa } from 'execa'
import { afterAll, beforeAll, expect, test } from 'vitest'

const root = fileURLToPath(new URL('../../', import.meta.url))

/** Holds programs in place of the system's: the caller is not root, and `sudo` says what it was to run. */
let bin: string

beforeAll(async () => {
  bin = await mkdtemp(join(tmpdir(), 'varve-bin-'))
  const programs = { id: 'echo 1000', sudo: String.raw`printf '%s\n' "$@"` }
  for (const [name, script] of Object.entries(programs)) {
    await writeFile(join(bin, name), `#!/bin/sh\n${script}\n`)
    await chmod(join(bin, name), 0o755)
  }
})
afterAll(() => rm(bin, { recursive: true }))

test.each([
  ['demo', root],
  ['demo', join(root, 'docs')],
  ['test', tmpdir()],
  ['prepare', tmpdir()],
])('scripts/%s, called by another user than root from %s, goes on with itself by sudo', async (name, cwd) => {
  const script = join(root, 'scripts', name)
  const { stdout } = await execa(relative(cwd, script), ['an argument'], {
    cwd,
    env: { PATH: `${bin}:${process.env.PATH}` },
  })
  const [found = '', ...args] = stdout.split('\n').slice(-2)
  expect(join(cwd, relative(cwd, found))).toBe(script)
  await access(found, constants.X_OK)
  expect(args).toEqual(['an argument'])
})
