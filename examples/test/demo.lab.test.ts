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

const run = (...args: string[]) =>
  execa(process.execPath, ['--import', 'tsx', demo, ...args], { env: { TMPDIR: folder }, reject: false })

/** No file but those of the TypeScript loader, and no process of a server or of a virtual machine. */
async function expectNothingLeft(): Promise<void> {
  const files = (await readdir(folder)).filter(name => !name.startsWith('tsx-') && !name.startsWith('node-'))
  expect(files).toEqual([])
  expect((await execa('pgrep', ['-af', folder], { reject: false })).stdout).toBe('')
}

const IN_GUEST = [
  'the restored vda has the SHA-256 from before its backup',
  "the restored vdb is exactly the guest's first",
  'of the stored chain and Varve restore the same: qemu-img compare',
  'the 3 backups of the chain are whole: every byte has its BLAKE3 digest',
  'the restored guest boots, and reads vda with the same SHA-256 as before its backup, and vdb as well',
  'files pass sha256sum -c, and',
  'after a restore the chain goes on, and no overlay, bitmap, snapshot or journal is left over',
]

test('the demonstration of a guest proves all that it says, and leaves nothing behind', async () => {
  const { stdout, exitCode } = await run()
  expect(exitCode, stdout).toBe(0)
  const proofs = stdout.split('\n').filter(line => line.includes('PROVED  '))
  for (const proof of IN_GUEST) expect(proofs.join('\n')).toContain(proof)
  expect(proofs).toHaveLength(IN_GUEST.length)
  await expectNothingLeft()
})

test('the demonstration on disk images proves all that it says, and leaves nothing behind', async () => {
  const { stdout, exitCode } = await run('--image')
  expect(stdout.match(/PROVED {2}/g), stdout).toHaveLength(6)
  expect(exitCode).toBe(0)
  await expectNothingLeft()
})

test('the demonstration that is stopped in the middle of a backup leaves nothing behind', async () => {
  const running = run('--image')
  for await (const line of running) {
    if (String(line).includes('Full backup')) running.kill('SIGINT')
  }
  const { stdout, exitCode } = await running
  expect(stdout).toContain('Stopped. Nothing is left behind.')
  expect(exitCode).toBe(130)
  await expectNothingLeft()
})
