import { bytesBody, type StorageDriver } from '@varve/core'
import { describe, expect, test } from 'vitest'
import {
  anotherError,
  begin,
  type Contract,
  type DriverTarget,
  errorOf,
  listed,
  place,
} from './contract-target.ts'

/** Uploads under way at once while a long listing is prepared. */
const PARALLEL = 16

/** Listings by prefix, short and long. */
export function describeListing(contract: Contract): void {
  describe('listing', () => {
    test('an empty storage lists nothing, under any prefix', async () => {
      const { driver } = await begin(contract.create)
      expect(await listed(driver)).toEqual([])
      expect(await listed(driver, 'none')).toEqual([])
      expect(await listed(driver, 'none/at/all/')).toEqual([])
    })

    test('a prefix is a string and no folder', async () => {
      const target = await begin(contract.create)
      const { driver } = target
      const keys = ['a', 'ab/c', 'ab/d/e', 'ab/d/f/g', 'abc', 'b/ab/c', 'ab-'].sort()
      await store(target, keys)
      expect(await listed(driver)).toEqual(keys)
      const prefixes = ['a', 'ab', 'ab/', 'ab/d', 'ab/d/', 'ab/d/f/g', 'ab/d/f/g/', 'b/a', 'ab/c/', 'x', 'bb']
      const tryPrefix = async (prefix: string) =>
        expect(await listed(driver, prefix), prefix).toEqual(keys.filter(key => key.startsWith(prefix)))
      await Promise.all(prefixes.map(tryPrefix))
    })

    test('a listing tells sizes and times', async () => {
      const target = await begin(contract.create)
      const { driver } = target
      for (const size of [0, 1, 70_000]) await place(target, `of/${size}`, new Uint8Array(size))
      for await (const object of driver.list('of/')) {
        expect(object).toEqual(await driver.stat(object.key))
        expect(object.size).toBe(Number(object.key.slice(3)))
      }
    })

    test('thousands of objects are listed, each once', async () => {
      const target = await begin(contract.create)
      const { driver } = target
      const keys = Array.from({ length: contract.manyObjects }, (_, index) => `many/${index % 7}/${index}`)
      await store(target, keys)
      expect(await listed(driver)).toEqual(keys.sort())
      expect(await listed(driver, 'many/3/')).toEqual(keys.filter(key => key.startsWith('many/3/')))
    })

    test('a listing can be left half-way', async () => {
      const target = await begin(contract.create)
      const { driver } = target
      await store(target, ['1', '2', '3'])
      for await (const { size } of driver.list('')) {
        expect(size).toBe(1)
        break
      }
      expect(await listed(driver)).toEqual(['1', '2', '3'])
    })

    test('a listing can be given up before it begins and half-way', async () => {
      const target = await begin(contract.create)
      const { driver } = target
      await store(target, ['1', '2', '3'])
      const controller = new AbortController()
      const giveUpHalfWay = async () => {
        for await (const _ of driver.list('', { signal: controller.signal })) controller.abort(anotherError)
      }
      await expect(giveUpHalfWay()).rejects.toMatchObject(errorOf('ABORTED'))
      await expect(giveUpHalfWay()).rejects.toMatchObject(errorOf('ABORTED'))
    })

    test('objects that come and go meanwhile do not break a listing', async () => {
      const target = await begin(contract.create)
      const { driver } = target
      const stays = Array.from({ length: 10 }, (_, index) => `stays/${index}`)
      await store(target, stays)
      let changing = true
      const changes = (async () => {
        for (let turn = 0; changing; turn++) {
          await driver.put(`comes/${turn}/object`, bytesBody(Buffer.from('x')))
          await driver.delete(`comes/${turn}/object`)
        }
      })()
      try {
        for (let turn = 0; turn < contract.turns; turn++) {
          expect((await listed(driver)).filter(key => key.startsWith('stays/'))).toEqual([...stays].sort())
        }
      } finally {
        changing = false
        await changes
      }
    })

    const store = async (target: DriverTarget, keys: readonly string[]) => {
      if (contract.fill) await contract.fill(target, keys)
      else await putAll(target.driver, keys)
    }
  })
}

/** Stores each key's name under it, many at once. */
async function putAll(driver: StorageDriver, keys: readonly string[]): Promise<void> {
  const waiting = [...keys]
  const upload = async () => {
    for (let key = waiting.pop(); key !== undefined; key = waiting.pop()) {
      await driver.put(key, bytesBody(Buffer.from(key)))
    }
  }
  await Promise.all(Array.from({ length: PARALLEL }, upload))
}
