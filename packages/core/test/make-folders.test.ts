import { mkdtemp, rm, stat, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, expect, test } from 'vitest'
import { makeFolders } from '../src/make-folders.ts'

let folder: string
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'varve-folders-'))
})
afterEach(() => rm(folder, { recursive: true }))

test('folders that are missing are made for their owner and told, the topmost first; those there are kept', async () => {
  const paths = ['a', 'a/b', 'a/b/c'].map(name => join(folder, name))
  expect(await makeFolders(join(folder, 'a/b/c'))).toEqual(paths)
  expect(await makeFolders(join(folder, 'a/b/c'))).toEqual([])
  expect(await makeFolders(join(folder, 'a/d/'))).toEqual([join(folder, 'a/d/')])
  expect(await makeFolders('/')).toEqual([])
  for (const path of paths) expect((await stat(path)).mode & 0o777).toBe(0o700)
})

test('a folder that the kernel does not make is an error and no endless loop', async () => {
  await expect(makeFolders('/proc/nope/runs')).rejects.toMatchObject({ code: 'ENOENT' })
})

test('a file on the way is an error', async () => {
  await writeFile(join(folder, 'file'), '')
  await expect(makeFolders(join(folder, 'file', 'runs'))).rejects.toMatchObject({ code: 'ENOTDIR' })
})
