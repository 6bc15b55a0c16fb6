import { once } from 'node:events'
import type { Readable } from 'node:stream'
import { buffer } from 'node:stream/consumers'
import { setTimeout as delay } from 'node:timers/promises'
import { bytesBody } from '@varve/core'
import { describe, expect, test } from 'vitest'
import {
  anotherError,
  bytesOf,
  type Contract,
  errorOf,
  expectStored,
  place,
  type RemoteTarget,
} from './contract-target.ts'
import { PatternBody } from './pattern-body.ts'
import {
  beginRemote,
  cleanUpAll,
  endStall,
  everyCall,
  expectAllRefused,
  expectNetworkError,
  outcomeOf,
  type Remote,
} from './remote-target.ts'
import { troubledSource } from './troubled-source.ts'

const SILENT = ['TIMEOUT', 'STORAGE_UNREACHABLE'] as const

/**
 * Servers that go silent end a call. What such a test waits for is mostly time, so that all cases, each with a driver and a
 * network of its own, wait at once.
 */
export function describeSilence(contract: Contract, remote: Remote): void {
  describe('silence', () => {
    const size = contract.streamSize
    const warmths = remote.keepsConnections ? [false, true] : [false]
    const when = remote.keepsConnections ? 'when it is first spoken to, or later,' : 'when it is spoken to'
    test.concurrent(`a server that is silent ${when} fails every call, and none hangs`, async context => {
      const trial = async (isWarm: boolean) => {
        const target = await beginRemote(remote, context)
        if (isWarm) await target.driver.put('calls/stat', bytesBody(Buffer.from('x')))
        target.proxy.stall()
        await expectAllRefused(target.driver, SILENT, remote)
        await expectWellAgain(target)
      }
      await Promise.all(warmths.map(trial))
    })

    test.concurrent('a server that goes silent in the middle of an upload, or of a download, fails it if it has not sent all', async context => {
      const uploading = async () => {
        const target = await beginRemote(remote, context)
        const upload = await outcomeOf(target.driver.put('a/b', stallingSource(target)))
        if ('value' in upload) expect.unreachable('the upload ended while nothing reached the server')
        expectNetworkError(upload.error, remote)
        await expectWellAgain(target)
        expect(await target.driver.stat('a/b')).toBeUndefined()
      }
      const downloading = async () => {
        const target = await beginRemote(remote, context)
        const body = new PatternBody({ size: contract.largeSize, seed: 31 })
        await place(target, 'a/large', body)
        const download = await target.driver.get('a/large')
        await once(download, 'readable')
        target.proxy.stall()
        const outcome = await outcomeOf(buffer(download))
        if ('error' in outcome) expectNetworkError(outcome.error, remote)
        else expect(outcome.value.equals(bytesOf(body))).toBe(true)
        await expectWellAgain(target)
      }
      await Promise.all([uploading(), downloading()])
    })

    test.concurrent('a call to a silent server, and an upload to one that has gone silent, can be given up and do not wait for it', async context => {
      const calling = async () => {
        const target = await beginRemote(remote, context)
        await place(target, 'calls/get', Buffer.from('x'))
        target.proxy.stall()
        const controller = new AbortController()
        const calls = everyCall(target.driver, { signal: controller.signal })
        await delay(remote.idleTimeoutMs / 10) // so that they are under way
        controller.abort(anotherError)
        const late = delay(0.75 * remote.idleTimeoutMs, { error: 'none, since it waits for the server' })
        for (const [name, call] of calls) {
          // an upload may try to remove what it left, for a while
          const outcome = await (name === 'put' ? call : Promise.race([call, late]))
          expect(outcome, name).toMatchObject({ error: errorOf('ABORTED') })
        }
        await expectWellAgain(target)
      }
      const uploading = async () => {
        const target = await beginRemote(remote, context)
        const controller = new AbortController()
        const source = stallingSource(target, () => controller.abort(anotherError))
        const upload = target.driver.put('a/b', source, { signal: controller.signal })
        await expect(upload).rejects.toMatchObject(errorOf('ABORTED'))
        expect(source.destroyed).toBe(true)
        await expectWellAgain(target)
        expect(await target.driver.stat('a/b')).toBeUndefined()
      }
      await Promise.all([calling(), uploading()])
    })

    /** A source whose second half finds the network stalled. */
    function stallingSource({ proxy }: RemoteTarget, onStalled?: () => void): Readable {
      const stalled = Promise.withResolvers<void>()
      const onTaken = () => {
        proxy.stall()
        onStalled?.()
        stalled.resolve()
      }
      return troubledSource({ kind: 'wait', resumed: stalled.promise, size }, { bytes: size / 2, onTaken })
    }

    async function expectWellAgain(target: RemoteTarget): Promise<void> {
      endStall(target)
      await cleanUpAll(target.driver)
      if (contract.brief) return // a server that comes back is asked again in tests of its own
      await target.driver.put('well/again', bytesBody(Buffer.from('x')))
      await expectStored(target, 'well/again', Buffer.from('x'))
    }
  })
}
