import { Readable } from 'node:stream'
import { bytesBody } from '@varve/core'
import { describe, expect, test } from 'vitest'
import {
  begin,
  type Contract,
  errorOf,
  expectNothing,
  expectStored,
  listed,
  place,
  rawNames,
} from './contract-target.ts'

const ODD_KEYS = [
  'with space/ leading/trailing /two  spaces',
  'ünïcødé/日本語/🙂/\u00e9.qcow2',
  'ünïcødé/日本語/🙂/e\u0301.qcow2', // the same name, otherwise composed
  '-rf/.hidden/..twodots/...',
  '%2e%2e/%2F/query?x=1&y=2#fragment;p/a%00b',
  'glob*/[a-z]/{a,b}/!/quotes\'"`/$(id)/$HOME/~',
  'colon:name/at@host/plus+plus/comma,semi;/--option',
  'Case/KEY',
  'case/key',
]
/** The same oddities in fewer names, but for those that are to be told apart. */
const BRIEF_ODD_KEYS = [
  '-rf/.hidden/..twodots/.../with space/ leading/trailing /two  spaces',
  'ünïcødé/日本語/🙂/\u00e9.qcow2/KEY',
  'ünïcødé/日本語/🙂/e\u0301.qcow2/KEY',
  'ünïcødé/日本語/🙂/\u00e9.qcow2/key',
  '%2e%2e/%2F/query?x=1&y=2#fragment;p/a%00b',
  'glob*/[a-z]/{a,b}/!/quotes\'"`/$(id)/$HOME/~/colon:name/at@host/plus+plus/comma,semi;/--option',
]
const DEEP = Array.from({ length: 40 }, (_, depth) => `d${depth}`).join('/')

const BAD_KEYS = [
  '',
  '/',
  '/absolute',
  'folder/',
  'a//b',
  '.',
  '..',
  './a',
  '../outside',
  'a/../../outside',
  'a/..',
  'a/./b',
  'back\\slash',
  'nul\0byte',
  'line\nfeed',
  'carriage\rreturn',
  'delete\u007f',
  'half\ud800surrogate',
  `a/${'n'.repeat(256)}`,
  `a/${'ü'.repeat(128)}`,
  `${'k/'.repeat(512)}k`,
  '.varve-part-0123456789abcdef',
  'a/.varve-part-x/b',
]

const LONGEST_NAME = 255

/** Names that are odd but right, and names that are refused. */
export function describeKeys(contract: Contract): void {
  const { longestName = LONGEST_NAME } = contract
  const oddKeys = [...(contract.brief ? BRIEF_ODD_KEYS : ODD_KEYS), `${DEEP}/${'n'.repeat(longestName)}`]
  describe('keys', () => {
    test('odd names are kept as they are', async () => {
      const target = await begin(contract.create)
      await Promise.all(oddKeys.map(key => target.driver.put(key, bytesBody(Buffer.from(`<${key}>`)))))
      await Promise.all(oddKeys.map(key => expectStored(target, key, Buffer.from(`<${key}>`))))
      expect(await listed(target.driver)).toEqual([...oddKeys].sort())
      // each is looked for by a prefix and deleted, or the oddest
      const prefixes = contract.brief ? oddKeys.filter(key => /[%*]/.test(key)) : oddKeys
      await Promise.all(prefixes.map(async key => expect(await listed(target.driver, key)).toEqual([key])))
      await Promise.all(prefixes.map(key => target.driver.delete(key)))
      const others = oddKeys.filter(key => !prefixes.includes(key))
      expect(await rawNames(target)).toEqual(others.sort())
    })

    if (longestName < LONGEST_NAME) {
      test('a name that is too long for the storage is an error, and leaves nothing', async () => {
        const target = await begin(contract.create)
        const key = `long/${'n'.repeat(longestName + 1)}`
        const put = target.driver.put(key, bytesBody(Buffer.from('x')))
        await expect(put).rejects.toMatchObject({ name: 'VarveError' })
        await expectNothing(target)
      })
    }

    test('names that are none are refused by every method, as keys and as prefixes', async () => {
      const target = await begin(contract.create)
      const { driver } = target
      const refused = errorOf('INVALID_KEY')
      for (const key of BAD_KEYS) {
        const name = JSON.stringify(key)
        await expect(driver.put(key, bytesBody(Buffer.from('x'))), name).rejects.toMatchObject(refused)
        await expect(driver.get(key), name).rejects.toMatchObject(refused)
        await expect(driver.stat(key), name).rejects.toMatchObject(refused)
        await expect(driver.delete(key), name).rejects.toMatchObject(refused)
        // everything begins with '', and with a folder's name
        if (key === '' || key === 'folder/') continue
        await expect(listed(driver, key), name).rejects.toMatchObject(refused)
      }
      await expectNothing(target)
    })

    test('a stream that is offered under a refused key is destroyed', async () => {
      const { driver } = await begin(contract.create)
      const source = Readable.from([Buffer.from('x')])
      await expect(driver.put('../outside', source)).rejects.toMatchObject(errorOf('INVALID_KEY'))
      expect(source.destroyed).toBe(true)
    })

    const { create, neighbour: createNeighbour } = contract
    if (createNeighbour === undefined) return
    test('two drivers with neighbouring prefixes do not see each other', async () => {
      const target = await begin(create)
      const neighbour = await createNeighbour(target)
      await place(target, 'same', Buffer.from('mine'))
      await neighbour.put('same', bytesBody(Buffer.from('theirs')))
      await neighbour.put('other', bytesBody(Buffer.from('theirs')))
      expect(await listed(target.driver)).toEqual(['same'])
      expect(await listed(neighbour)).toEqual(['other', 'same'])
      await target.driver.delete('same')
      expect(await target.driver.stat('other')).toBeUndefined()
      expect(await neighbour.stat('same')).toMatchObject({ size: 6 })
      await neighbour[Symbol.asyncDispose]()
    })
  })
}
