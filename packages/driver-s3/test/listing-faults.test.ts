import { expect, test } from 'vitest'
import { begin } from './faulty-s3.ts'

test.each([
  ['encodes', true],
  ['does not encode', false],
])('names are read as they are from a server that %s them', async (_, encodesNames) => {
  const { fake, driver } = await begin()
  fake.encodesNames = encodesNames
  const keys = ['100%25', 'a%20b', 'a+b', 'a b', 'ü/%zz']
  for (const key of keys) fake.objects.set(key, { bytes: Buffer.of(1), tag: undefined })
  const listed: string[] = []
  for await (const { key } of driver.list('')) listed.push(key)
  expect(listed).toEqual(keys)

  for (const key of keys) {
    fake.uploads.set(`of ${key}`, { key, tag: undefined, begunAt: new Date(0), parts: new Map() })
  }
  expect(await driver.cleanUp({ olderThan: new Date() })).toBe(keys.length)
  expect(fake.uploads.size).toBe(0)
  const removed = fake.requests.filter(({ method }) => method === 'DELETE')
  expect(removed.map(({ url }) => decodeURIComponent(url?.split('?')[0] ?? '').slice('/b/'.length))).toEqual(
    keys,
  )
})

test('a listing that does not say where it goes on is an error', async () => {
  const { fake, driver } = await begin()
  fake.endless = true
  const error = { code: 'STORAGE_FAILED', message: expect.stringContaining('does not go on') }
  await expect(driver.list('').next()).rejects.toMatchObject(error)
  await expect(driver.cleanUp({ olderThan: new Date() })).rejects.toMatchObject(error)
})
