import { bytesBody } from '@varve/core'
import { describe, expect, test } from 'vitest'
import {
  anotherError,
  begin,
  bytesOf,
  type Contract,
  errorOf,
  expectNothing,
  expectStored,
  type FullTarget,
  listed,
  place,
  rawNames,
} from './contract-target.ts'
import { PatternBody } from './pattern-body.ts'

/** The storage as a whole: what it says of itself, its health, its leftovers, its end. */
export function describeStorage(contract: Contract): void {
  const { createFull, leaveUnfinished } = contract
  const { maxObjectSize } = contract.capabilities

  describe('the storage', () => {
    test('a driver says what it is and can', async () => {
      const { driver } = await begin(contract.create)
      expect(driver.type).toMatch(/^[a-z0-9-]+$/)
      expect(driver.location).not.toBe('')
      expect(driver.capabilities).toEqual(contract.capabilities)
      const cleansUp = driver.cleanUp !== undefined
      expect(cleansUp, 'cleanUp and leaveUnfinished need each other').toBe(leaveUnfinished !== undefined)
    })

    test('a check of a storage that is well passes every step and leaves nothing', async () => {
      const target = await begin(contract.create)
      const health = await target.driver.check()
      expect(health.checks).toEqual(
        ['connect', 'write', 'read', 'list', 'delete'].map(name => ({ name, ok: true })),
      )
      expect(health.ok).toBe(true)
      expect(health.durationMs).toBeGreaterThan(0)
      if (health.freeBytes !== undefined) expect(health.freeBytes).toBeGreaterThan(0)
      await expectNothing(target)
    })

    test('a check can be given up', async () => {
      const { driver } = await begin(contract.create)
      const check = driver.check({ signal: AbortSignal.abort(anotherError) })
      await expect(check).rejects.toMatchObject(errorOf('ABORTED'))
    })

    test('what moves no data can be given up as well', async () => {
      const target = await begin(contract.create)
      await place(target, 'stays', Buffer.from('x'))
      const given = { signal: AbortSignal.abort(anotherError) }
      await expect(target.driver.stat('stays', given)).rejects.toMatchObject(errorOf('ABORTED'))
      await expect(target.driver.delete('stays', given)).rejects.toMatchObject(errorOf('ABORTED'))
      await expectStored(target, 'stays', Buffer.from('x'))
    })

    test('a driver can be disposed of more than once', async () => {
      const { driver } = await begin(contract.create)
      await driver.put('object', bytesBody(Buffer.from('x')))
      await driver[Symbol.asyncDispose]()
      await driver[Symbol.asyncDispose]()
    })

    if (maxObjectSize !== undefined) {
      test('an object larger than the storage takes is refused before anything is sent', async () => {
        const target = await begin(contract.create)
        const body = {
          size: maxObjectSize + 1,
          replayable: true,
          open: () => expect.unreachable('the body was opened'),
        }
        await expect(target.driver.put('large', body)).rejects.toMatchObject({ name: 'VarveError' })
        await expectNothing(target)
      })
    }

    if (leaveUnfinished) {
      test('what a killed upload leaves is no object, and is cleaned up when it is old', async () => {
        const target = await begin(contract.create)
        const { driver } = target
        await place(target, 'whole', Buffer.from('stays'))
        await leaveUnfinished(target)
        expect(await rawNames(target)).toHaveLength(2)
        expect(await listed(driver)).toEqual(['whole'])
        const hour = 3_600_000
        expect(await driver.cleanUp?.({ olderThan: new Date(Date.now() - hour) })).toBe(0)
        expect(await rawNames(target)).toHaveLength(2)
        expect(await driver.cleanUp?.({ olderThan: new Date(Date.now() + hour) })).toBe(1)
        await expectStored(target, 'whole', Buffer.from('stays'))
      })
    }
  })

  if (createFull === undefined) return
  describe('a full storage', () => {
    const beginFull = (): Promise<FullTarget> => begin(createFull)
    const errorIn = ({ code = 'STORAGE_FULL' }: FullTarget) => errorOf(code)

    test('an object that does not fit fails with the right code and leaves nothing', async () => {
      const target = await beginFull()
      const body = new PatternBody({ size: target.capacity * 2 })
      await expect(target.driver.put('a/too-large', body)).rejects.toMatchObject(errorIn(target))
      expect(body.faults).toEqual([])
      await expectNothing(target)
    })

    test('a stream that does not fit is destroyed and leaves nothing', async () => {
      const target = await beginFull()
      const source = new PatternBody({ size: target.capacity * 2 }).open()
      await expect(target.driver.put('a/too-large', source)).rejects.toMatchObject(errorIn(target))
      expect(source.destroyed).toBe(true)
      await expectNothing(target)
    })

    test('the objects that are there stay, and a small one still finds room', async () => {
      const target = await beginFull()
      const former = { size: Math.floor(target.capacity / 4), seed: 1 }
      await place(target, 'object', former)
      const larger = new PatternBody({ size: target.capacity, seed: 2 })
      await expect(target.driver.put('object', larger)).rejects.toMatchObject(errorIn(target))
      await target.driver.put('small', new PatternBody({ size: 1000, seed: 3 }))
      await expectStored(target, 'object', bytesOf(former))
      await expectStored(target, 'small', bytesOf({ size: 1000, seed: 3 }))
    })
  })
}
