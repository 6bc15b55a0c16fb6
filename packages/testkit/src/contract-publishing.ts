import { once } from 'node:events'
import { buffer } from 'node:stream/consumers'
import { describe, expect, test } from 'vitest'
import {
  begin,
  bytesOf,
  type Contract,
  errorOf,
  expectStored,
  listed,
  place,
  read,
} from './contract-target.ts'
import { patternBytes } from './pattern.ts'
import { PatternBody } from './pattern-body.ts'
import { troubledSource } from './troubled-source.ts'

/** When an object is seen, and by whom. */
export function describePublishing(contract: Contract): void {
  describe('publishing', () => {
    const size = contract.streamSize
    test('nothing is seen of an object before its upload is done', async () => {
      const { driver, upload, target } = await beginUpload('a/new')
      expect(await driver.stat('a/new')).toBeUndefined()
      await expect(driver.get('a/new')).rejects.toMatchObject(errorOf('OBJECT_NOT_FOUND'))
      expect(await listed(driver)).toEqual([])
      await upload.finish()
      await expectStored(target, 'a/new', patternBytes(0, 0, size))
    })

    if (contract.capabilities.atomicPublish) {
      test('an object that is being replaced stays readable as it was until the new one is whole', async () => {
        const former = patternBytes(5, 0, 70_000)
        const { driver, upload, target } = await beginUpload('a/object', former)
        expect(await read(driver, 'a/object')).toEqual(former)
        expect(await driver.stat('a/object')).toMatchObject({ size: former.byteLength })
        expect(await listed(driver)).toEqual(['a/object'])
        await upload.finish()
        await expectStored(target, 'a/object', patternBytes(0, 0, size))
      })
    }

    if (contract.capabilities.atomicPublish) {
      test('a download that has begun ends with the object that it began with', async () => {
        const target = await begin(contract.create)
        const former = new PatternBody({ size: contract.largeSize, seed: 6 })
        await place(target, 'a/object', former)
        const download = await target.driver.get('a/object')
        await once(download, 'readable')
        await target.driver.put('a/object', new PatternBody({ size: contract.largeSize, seed: 7 }))
        expect((await buffer(download)).equals(bytesOf(former))).toBe(true)
      })
    }

    test('an object that is deleted while it is uploaded anew is the new one in the end', async () => {
      const { driver, upload, target } = await beginUpload('a/object', Buffer.from('former'))
      await driver.delete('a/object')
      await upload.finish()
      await expectStored(target, 'a/object', patternBytes(0, 0, size))
    })

    /** An upload that has come half the way, over a former object where one is given. */
    async function beginUpload(key: string, former?: Uint8Array) {
      const target = await begin(contract.create)
      const { driver } = target
      if (former) await place(target, key, former)
      const taken = Promise.withResolvers<void>()
      const resumed = Promise.withResolvers<void>()
      const source = troubledSource(
        { kind: 'wait', resumed: resumed.promise, size },
        { bytes: size / 2, onTaken: taken.resolve },
      )
      const put = driver.put(key, source)
      await Promise.race([taken.promise, put])
      const finish = () => {
        resumed.resolve()
        return put
      }
      return { target, driver, upload: { finish } }
    }
  })
}
