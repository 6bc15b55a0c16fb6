import { mkdtemp, readdir, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { execa } from 'execa'
import { afterEach, beforeEach, expect, test } from 'vitest'

const demo = fileURLToPath(new URL('../../scripts/demonstration/main.ts', import.meta.url))

let folder: string

beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'varve-demo-test-'))
})
afterEach(() => rm(folder, { recursive: true }))

const run = () =>
  execa(process.execPath, ['--import', 'tsx', demo, '--image'], { env: { TMPDIR: folder }, reject: false })

/** What is left in the folder for temporary files, but for the cache of the TypeScript loader. */
async function left(): Promise<string[]> {
  return (await readdir(folder)).filter(name => !name.startsWith('tsx-') && !name.startsWith('node-'))
}

test('the demonstration on disk images proves all that it says, and leaves nothing behind', async () => {
  const { stdout, exitCode } = await run()
  expect(stdout.match(/PROVED {2}/g), stdout).toHaveLength(6)
  expect(exitCode).toBe(0)
  expect(await left()).toEqual([])
})

test('the demonstration that is stopped in the middle of a backup leaves nothing behind', async () => {
  const running = run()
  for await (const line of running) {
    if (String(line).includes('Full backup')) running.kill('SIGINT')
  }
  const { stdout, exitCode } = await running
  expect(stdout).toContain('Stopped. Nothing is left behind.')
  expect(exitCode).toBe(130)
  expect(await left()).toEqual([])
})
