import { isVarveError, type StorageDriver } from '@varve/core'
import { expect } from 'vitest'

/** The sizes of what a driver lists below a prefix, by key. */
export async function sizes(driver: StorageDriver, prefix: string): Promise<Record<string, number>> {
  const found: Record<string, number> = {}
  for await (const { key, size } of driver.list(prefix)) found[key] = size
  return found
}

/** Expects a listing to fail with this code and without these secrets, and the first step of a check too. */
export async function expectRefused(
  driver: StorageDriver,
  code: string,
  secrets: readonly string[],
): Promise<void> {
  const listing = driver.list('')[Symbol.asyncIterator]().next()
  const error = await listing.catch((error: unknown) => error)
  expect(error).toMatchObject({ code })
  for (const secret of secrets) {
    expect(String(error) + JSON.stringify(isVarveError(error) && error.context)).not.toContain(secret)
  }
  expect((await driver.check()).checks).toMatchObject([{ name: 'connect', ok: false, code }])
}
