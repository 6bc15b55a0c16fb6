import { chmod, mkdtemp, readdir, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { execa } from 'execa'
import { afterEach, beforeEach, expect } from 'vitest'

const demo = fileURLToPath(new URL('../../scripts/demonstration/main.ts', import.meta.url))

let folder: string

beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'varve-demo-test-'))
  await chmod(folder, 0o711) // the servers have users of their own
})
afterEach(() => rm(folder, { recursive: true }))

/** Runs the demonstration, with a folder of its own for its temporary files. */
export const runDemo = (...args: string[]) =>
  execa(process.execPath, [demo, ...args], { env: { TMPDIR: folder }, reject: false })

/** No file, and no process of a server or of a virtual machine. */
export async function expectNothingLeft(): Promise<void> {
  expect(await readdir(folder)).toEqual([])
  expect((await execa('pgrep', ['-af', folder], { reject: false })).stdout).toBe('')
}
