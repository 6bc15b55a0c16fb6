import { mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { execa } from 'execa'
import { expect, onTestFinished, test } from 'vitest'

const program = fileURLToPath(new URL('./put-in-place-once.ts', import.meta.url))

test('a new file gets its name, or leaves what has it alone, on a file system without links', async () => {
  const folder = await mkdtemp(join(tmpdir(), 'varve-place-'))
  onTestFinished(() => rm(folder, { recursive: true }))
  const temporary = join(folder, 'new.tmp')
  const target = join(folder, 'new')
  /** As on FAT, which refuses every link. */
  const putInPlace = async () => {
    const trace = join(folder, 'strace')
    const { exitCode, stderr } = await execa(
      'strace',
      [
        ...['-f', '-qq', '-e', 'inject=link,linkat:error=EPERM', '-o', trace],
        ...[process.execPath, program, JSON.stringify({ temporary, target, isNew: true })],
      ],
      { reject: false, timeout: 60_000 },
    )
    expect(await readFile(trace, 'utf8')).toContain('(INJECTED)')
    await rm(trace)
    return { exitCode, stderr }
  }

  await writeFile(temporary, 'ours')
  expect(await putInPlace()).toEqual({ exitCode: 0, stderr: '' })
  expect(await readdir(folder)).toEqual(['new'])
  expect(await readFile(target, 'utf8')).toBe('ours')

  await writeFile(temporary, 'ours too')
  expect(await putInPlace()).toEqual({ exitCode: 1, stderr: expect.stringMatching(/code: 'TARGET_EXISTS'/) })
  expect(await readFile(target, 'utf8')).toBe('ours')
  expect(await readFile(temporary, 'utf8')).toBe('ours too')
})
