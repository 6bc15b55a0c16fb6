import { Readable } from 'node:stream'
import { setTimeout as delay } from 'node:timers/promises'
import { bytesBody } from '@varve/core'
import { describe, expect, test } from 'vitest'
import { type Contract, expectStored, listed } from './contract-target.ts'
import { findProcessWithAny } from './lab-process.ts'
import { beginRemote, expectAllRefused, expectNoSecrets, outcomeOf, type Remote } from './remote-target.ts'
import { troubledSource } from './troubled-source.ts'

/** How often all processes are looked at, which is work. A program takes longer. */
const LOOK_EVERY_MS = 60

/** Servers that cannot be reached, or let nobody in, and secrets that stay where they are. */
export function describeRefusal(contract: Contract, remote: Remote): void {
  describe('refusal', () => {
    for (const warm of remote.keepsConnections ? [false, true] : [false]) {
      test(`a server that refuses connections ${warm ? 'later' : 'from the start'} cannot be reached by any call`, async () => {
        const target = await beginRemote(remote)
        const { driver, proxy } = target
        if (warm) await driver.put('calls/stat', bytesBody(Buffer.from('x')))
        proxy.refuse()
        proxy.cutAll()
        await expectAllRefused(driver, ['STORAGE_UNREACHABLE'], remote)
        proxy.accept()
        await driver.put('well/again', bytesBody(Buffer.from('x')))
        await expectStored(target, 'well/again', Buffer.from('x'))
      })
    }

    for (const { what, code, create } of remote.refused) {
      test(`${what} is ${code} for every call`, async () => {
        await using driver = await create()
        await expectAllRefused(driver, [code], remote)
        const source = Readable.from([Buffer.from('x')])
        await expect(driver.put('a/stream', source)).rejects.toMatchObject({ code })
        expect(source.destroyed).toBe(true)
        expectNoSecrets(driver, remote.secrets, 'the driver')
      })
    }
  })

  describe('secrets', () => {
    test('are in nothing that is seen of a driver', async () => {
      const { driver } = await beginRemote(remote)
      expectNoSecrets(driver, remote.secrets, 'the driver')
    })

    if (process.platform !== 'linux') return // command lines are looked up in /proc
    test('are in no command line while a driver is at work, and are not seen of it afterwards', async () => {
      const { driver } = await beginRemote(remote)
      const lookAround = async () => {
        const found = await findProcessWithAny(remote.secrets)
        expect(found, 'the process whose command line shows a secret').toBeUndefined()
      }
      const size = contract.largeSize
      const seen = Promise.withResolvers<void>()
      const source = troubledSource(
        { kind: 'wait', resumed: seen.promise, size },
        { bytes: Math.floor(size / 2), onTaken: () => lookAround().then(seen.resolve, seen.reject) },
      )
      let done = false
      const work = async () => {
        await Promise.all([seen.promise, driver.put('a/large', source)])
        for await (const _ of await driver.get('a/large'));
        await listed(driver)
        if (!contract.brief) await driver.check() // which makes such calls
        await driver.delete('a/large')
      }
      const outcome = outcomeOf(work()).finally(() => {
        done = true
      })
      for (; !done; await delay(LOOK_EVERY_MS)) await lookAround()
      expect(await outcome).toEqual({ value: undefined })
      expectNoSecrets(driver, remote.secrets, 'the driver')
    })
  })
}
