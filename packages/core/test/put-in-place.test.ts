import { link, mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, expect, test, vi } from 'vitest'
import { putInPlace } from '../src/put-in-place.ts'

vi.mock('node:fs/promises', { spy: true })

let folder: string
let temporary: string
let target: string

beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'varve-place-'))
  temporary = join(folder, 'new.tmp')
  target = join(folder, 'new')
  await writeFile(temporary, 'ours')
})
afterEach(async () => {
  vi.mocked(link).mockReset()
  await rm(folder, { recursive: true })
})

/** As on a file system that has no links. */
function withoutLinks(): void {
  vi.mocked(link).mockRejectedValue(Object.assign(new Error('not permitted'), { code: 'EPERM' }))
}

test.each([
  ['with', () => undefined],
  ['without', withoutLinks],
])('a new file gets its name, or leaves what has it alone, on a file system %s links', async (_, prepare) => {
  prepare()
  await putInPlace({ temporary, target, isNew: true })
  expect(await readdir(folder)).toEqual(['new'])
  expect(await readFile(target, 'utf8')).toBe('ours')

  await writeFile(temporary, 'ours too')
  await expect(putInPlace({ temporary, target, isNew: true })).rejects.toMatchObject({
    code: 'TARGET_EXISTS',
    context: { path: target },
  })
  expect(await readFile(target, 'utf8')).toBe('ours')
  expect(await readFile(temporary, 'utf8')).toBe('ours too')
  await putInPlace({ temporary, target })
  expect(await readFile(target, 'utf8')).toBe('ours too')
})

test('one that was cut short between its two names is carried on', async () => {
  await link(temporary, target)
  await putInPlace({ temporary, target, isNew: true })
  expect(await readdir(folder)).toEqual(['new'])
})
