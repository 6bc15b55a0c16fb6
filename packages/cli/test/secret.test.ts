import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { z } from 'zod'
import { openStorage, parseConfig } from '../src/config.ts'
import { secretField } from '../src/secret.ts'
import { type StorageType, storageType } from '../src/storage-type.ts'

let folder: string
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'varve-secret-'))
})
afterAll(() => rm(folder, { recursive: true }))

/** Reads a secret the way a storage does: its value is what the storage was opened with. */
async function secretOf(password: unknown, env: Record<string, string> = {}): Promise<string | undefined> {
  let read: string | undefined
  const vault: StorageType = storageType(
    z.strictObject({ password: secretField }),
    async (options, secrets) => {
      read = await secrets('password', options.password)
      const { LocalDriver } = await import('@varve/driver-local')
      return new LocalDriver({ path: folder })
    },
  )
  const text = JSON.stringify({ storages: { safe: { type: 'vault', password } } })
  const config = parseConfig(text, join(folder, 'config.json'), new Map([['vault', vault]]))
  await openStorage(config, 'safe', env)
  return read
}

test('a secret is text, or comes from the environment, or from a file beside the configuration', async () => {
  await writeFile(join(folder, 'password'), 'from the file\n')
  expect(await secretOf('itself')).toBe('itself')
  expect(await secretOf({ env: 'PASSWORD' }, { PASSWORD: 'from env' })).toBe('from env')
  expect(await secretOf({ file: 'password' })).toBe('from the file')
  expect(await secretOf({ file: join(folder, 'password') })).toBe('from the file')
})

test('a secret that cannot be read names its field and where it was looked for', async () => {
  await writeFile(join(folder, 'empty'), '\n')
  for (const [secret, named] of [
    [{ env: 'NOT_SET' }, 'NOT_SET'],
    [{ file: 'missing' }, join(folder, 'missing')],
    [{ file: 'empty' }, join(folder, 'empty')],
  ] as const) {
    await expect(secretOf(secret)).rejects.toMatchObject({
      code: 'INVALID_CONFIG',
      message: expect.stringMatching(/storages\.safe\.password/),
    })
    await expect(secretOf(secret)).rejects.toThrow(named)
  }
})

test.each([[7], [null], [{}], [{ env: 1 }], [{ env: 'A', file: 'b' }], [{ value: 'hunter2' }]])(
  '%j is no secret: its field is named, its content is not',
  async secret => {
    await expect(secretOf(secret)).rejects.toMatchObject({
      code: 'INVALID_CONFIG',
      message: expect.stringMatching(/storages\.safe\.password: expected text, \{ "env"/),
    })
    await expect(secretOf(secret)).rejects.not.toThrow(/hunter2/)
  },
)

test('an empty secret is refused', async () => {
  await expect(secretOf('')).rejects.toThrow(/storages\.safe\.password: must not be empty/)
  await expect(secretOf({ env: '' })).rejects.toThrow(/storages\.safe\.password/)
})
