import { link, mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, expect, test } from 'vitest'
import { putInPlace } from '../src/put-in-place.ts'

let folder: string
let temporary: string
let target: string

beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'varve-place-'))
  temporary = join(folder, 'new.tmp')
  target = join(folder, 'new')
  await writeFile(temporary, 'ours')
})
afterEach(() => rm(folder, { recursive: true }))

test('a new file gets its name, or leaves what has it alone', async () => {
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
