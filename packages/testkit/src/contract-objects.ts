import { Readable } from 'node:stream'
import { bytesBody } from '@varve/core'
import { describe, expect, test } from 'vitest'
import {
  begin,
  bytesOf,
  type Contract,
  errorOf,
  expectAllStored,
  expectFound,
  expectNothing,
  expectStored,
  place,
  read,
} from './contract-target.ts'
import { patternBytes } from './pattern.ts'
import { PatternBody } from './pattern-body.ts'

/** Objects that are stored, looked up, replaced and deleted. */
export function describeObjects(contract: Contract): void {
  describe('objects', () => {
    test('an object comes back as it was stored and tells when, and put tells its key and size', async () => {
      const target = await begin(contract.create)
      const bytes = patternBytes(1, 0, 10_000)
      expect(await target.driver.put('a/b/c.bin', bytesBody(bytes))).toMatchObject({
        key: 'a/b/c.bin',
        size: 10_000,
      })
      await expectStored(target, 'a/b/c.bin', bytes)
      const found = (await target.driver.stat('a/b/c.bin')) ?? expect.fail('it is not found')
      expect(found).toMatchObject({ key: 'a/b/c.bin', size: 10_000 })
      const { modifiedAt } = found
      const ageMs = Date.now() - (modifiedAt?.getTime() ?? Date.now())
      expect(Math.abs(ageMs)).toBeLessThan(10 * 60_000) // clocks differ
    })

    test('an empty object is an object', async () => {
      const target = await begin(contract.create)
      await target.driver.put('known', bytesBody(new Uint8Array()))
      await target.driver.put('unknown', Readable.from([]))
      await Promise.all(['known', 'unknown'].map(key => expectFound(target, key, new Uint8Array())))
    })

    test.each([
      ['a re-openable body', true],
      ['a body that opens once', false],
    ])('a large object of known size is stored whole from %s', async (_, replayable) => {
      const target = await begin(contract.create)
      const body = new PatternBody({ size: contract.largeSize, seed: 2, chunkSize: 1024 * 1024, replayable })
      await target.driver.put('large', body)
      expect(body.faults).toEqual([])
      await expectFound(target, 'large', bytesOf(body))
    })

    test('a large object of unknown size is stored whole', async () => {
      const target = await begin(contract.create)
      const body = new PatternBody({ size: contract.largeSize, seed: 3 })
      await target.driver.put('large', body.open())
      await expectFound(target, 'large', bytesOf(body))
    })

    test('chunks of any size make the same object', async () => {
      const target = await begin(contract.create)
      const sizes = [0, 1, 3, 65_536, 1, 0, 300_000, 7, 1_048_577, 13, 5_000_000, 2]
      const chunks = sizes.map((size, seed) => patternBytes(seed, 0, size))
      await target.driver.put('chunks', Readable.from(chunks))
      await expectStored(target, 'chunks', Buffer.concat(chunks))
    })

    test('memory that is given back may be overwritten at once', async () => {
      const target = await begin(contract.create)
      const bodies = Array.from(
        { length: contract.brief ? 2 : 3 },
        (_, seed) => new PatternBody({ size: 6_000_000 + seed, seed, chunkSize: 100_000 }),
      )
      await Promise.all(bodies.map(body => target.driver.put(`recycled/${body.seed}`, body)))
      expect(bodies.flatMap(body => body.faults)).toEqual([])
      const stored = new Map(bodies.map(body => [`recycled/${body.seed}`, bytesOf(body)]))
      await expectAllStored(target, 'recycled/', stored)
    })

    test('progress goes from little to all', async () => {
      const target = await begin(contract.create)
      const body = new PatternBody({ size: 9_000_000 })
      const progress: number[] = []
      await target.driver.put('progress', body, { onProgress: bytes => progress.push(bytes) })
      expect(progress.at(-1)).toBe(body.size)
      expect(Math.max(...progress)).toBe(body.size)
      expect(progress[0]).toBeLessThan(body.size)
    })

    test('an object is replaced by a longer, a shorter and an empty one', async () => {
      const target = await begin(contract.create)
      for (const size of contract.brief ? [1000, 200_000, 0] : [1000, 200_000, 10, 0]) {
        const bytes = patternBytes(size, 0, size)
        await target.driver.put('replaced', bytesBody(bytes))
        if (size === 0 || !contract.brief) await expectFound(target, 'replaced', bytes)
        else expect(Buffer.from(await target.readRaw('replaced')).equals(bytes)).toBe(true)
      }
    })

    test('what is not there is no object', async () => {
      const target = await begin(contract.create)
      expect(await target.driver.stat('none')).toBeUndefined()
      expect(await target.driver.stat('no/folder/none')).toBeUndefined()
      await expect(target.driver.get('none')).rejects.toMatchObject(errorOf('OBJECT_NOT_FOUND'))
      await expect(target.driver.get('no/folder/none')).rejects.toMatchObject(errorOf('OBJECT_NOT_FOUND'))
    })

    test('a folder of objects is no object', async () => {
      const target = await begin(contract.create)
      await place(target, 'folder/object', Buffer.from('here'))
      expect(await target.driver.stat('folder')).toBeUndefined()
      await expect(target.driver.get('folder')).rejects.toMatchObject(errorOf('OBJECT_NOT_FOUND'))
      await target.driver.delete('folder')
      await expectStored(target, 'folder/object', Buffer.from('here'))
    })

    test('a name below an object is no object', async () => {
      const target = await begin(contract.create)
      await place(target, 'object', Buffer.from('here'))
      expect(await target.driver.stat('object/below')).toBeUndefined()
      await expect(target.driver.get('object/below')).rejects.toMatchObject(errorOf('OBJECT_NOT_FOUND'))
      await target.driver.delete('object/below')
      await expectStored(target, 'object', Buffer.from('here'))
    })

    test('a deleted object is gone, and its neighbours stay', async () => {
      const target = await begin(contract.create)
      const store = (key: string) => place(target, key, Buffer.from(key))
      await Promise.all(['a/1', 'a/2', 'a-2', 'b'].map(store))
      await target.driver.delete('a/1')
      expect(await target.driver.stat('a/1')).toBeUndefined()
      await expect(target.driver.get('a/1')).rejects.toMatchObject(errorOf('OBJECT_NOT_FOUND'))
      await expectAllStored(target, '', new Map(['a/2', 'a-2', 'b'].map(key => [key, Buffer.from(key)])))
    })

    test('deleting is no error when there is nothing to delete, nor a second time', async () => {
      const target = await begin(contract.create)
      await target.driver.delete('none')
      await target.driver.delete('no/folder/none')
      await place(target, 'once', Buffer.from('x'))
      await target.driver.delete('once')
      await target.driver.delete('once')
      await expectNothing(target)
    })

    test('parallel uploads of different keys do not mix', async () => {
      const target = await begin(contract.create)
      const bodies = Array.from(
        { length: contract.brief ? 4 : 8 },
        (_, seed) => new PatternBody({ size: 500_000 + seed, seed }),
      )
      const keyOf = ({ seed }: PatternBody) => `p/${seed % 3}/${seed}`
      await Promise.all(bodies.map(body => target.driver.put(keyOf(body), body)))
      await expectAllStored(target, 'p/', new Map(bodies.map(body => [keyOf(body), bytesOf(body)])))
    })

    test('parallel uploads of one key leave one of them whole', async () => {
      const target = await begin(contract.create)
      const bodies = Array.from(
        { length: contract.brief ? 3 : 6 },
        (_, seed) => new PatternBody({ size: 300_000 + seed, seed }),
      )
      await Promise.all(bodies.map(body => target.driver.put('contended', body)))
      const stored = await read(target.driver, 'contended')
      expect(bodies.filter(body => bytesOf(body).equals(stored))).toHaveLength(1)
    })

    test('uploads and deletes that make and empty the same folders all succeed', async () => {
      const target = await begin(contract.create)
      const bytes = Buffer.from('stays')
      const work = async (folder: number, worker: number) => {
        for (let turn = 0; turn < contract.turns; turn++) {
          const key = `busy/${folder}/folder/${worker}`
          await target.driver.put(key, bytesBody(bytes))
          expect(await target.driver.stat(key)).toMatchObject({ size: bytes.byteLength })
          await target.driver.delete(key)
        }
      }
      // two in a folder: each finds it empty, and removes it, often
      const folders = contract.brief ? [0] : [0, 1, 2, 3]
      await Promise.all(folders.flatMap(folder => [work(folder, 1), work(folder, 2)]))
      await expectNothing(target)
      await target.driver.put('busy/folder/last', bytesBody(bytes))
      await expectStored(target, 'busy/folder/last', bytes)
    })
  })
}
