import { once } from 'node:events'
import type { Readable } from 'node:stream'
import { buffer } from 'node:stream/consumers'
import { setTimeout as delay } from 'node:timers/promises'
import { bytesBody, type UploadBody } from '@varve/core'
import { describe, expect, test } from 'vitest'
import { bytesOf, type Contract, errorOf, expectStored, type RemoteTarget, read } from './contract-target.ts'
import { patternBytes } from './pattern.ts'
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

const DOWNLOAD_SIZE = 9_000_000
/**
 * The kernel takes up to 12 MB on the way to a slow server, at once: of so much more a driver sees that it is slow, for
 * longer than a server may be silent.
 */
const SLOW_SIZE = 30_000_000
const SILENT = ['TIMEOUT', 'STORAGE_UNREACHABLE'] as const

/** Servers that go silent end a call; sources and readers that do, do not. */
export function describeSilence(contract: Contract, remote: Remote): void {
  describe('silence', () => {
    const size = contract.streamSize
    for (const warm of remote.keepsConnections ? [false, true] : [false]) {
      test(`a server that is silent ${warm ? 'later' : 'when it is first spoken to'} fails every call, and none hangs`, async () => {
        const target = await beginRemote(remote)
        if (warm) await target.driver.put('calls/stat', bytesBody(Buffer.from('x')))
        target.proxy.stall()
        await expectAllRefused(target.driver, SILENT, remote)
        await expectWellAgain(target)
      })
    }

    test('a server that goes silent in the middle of an upload fails it', async () => {
      const target = await beginRemote(remote)
      const upload = await outcomeOf(target.driver.put('a/b', stallingSource(target)))
      if ('value' in upload) expect.unreachable('the upload ended while nothing reached the server')
      expectNetworkError(upload.error, remote)
      await expectWellAgain(target)
      expect(await target.driver.stat('a/b')).toBeUndefined()
    })

    test('a server that goes silent in the middle of a download fails it, if it has not sent all', async () => {
      const target = await beginRemote(remote)
      const body = new PatternBody({ size: contract.largeSize, seed: 31 })
      await target.driver.put('a/large', body)
      const download = await target.driver.get('a/large')
      await once(download, 'readable')
      target.proxy.stall()
      const outcome = await outcomeOf(buffer(download))
      if ('error' in outcome) expectNetworkError(outcome.error, remote)
      else expect(outcome.value.equals(bytesOf(body))).toBe(true)
      await expectWellAgain(target)
    })

    test('a call to a silent server can be given up, and does not wait for it', async () => {
      const target = await beginRemote(remote)
      await target.driver.put('calls/get', bytesBody(Buffer.from('x')))
      target.proxy.stall()
      const controller = new AbortController()
      const calls = everyCall(target.driver, { signal: controller.signal })
      await delay(remote.idleTimeoutMs / 10) // so that they are under way
      controller.abort()
      const late = delay(0.75 * remote.idleTimeoutMs, { error: 'none, since it waits for the server' })
      for (const [name, call] of calls) {
        // an upload may try to remove what it left, for a while
        const outcome = await (name === 'put' ? call : Promise.race([call, late]))
        expect(outcome, name).toMatchObject({ error: errorOf('ABORTED') })
      }
      await expectWellAgain(target)
    })

    test('an upload to a server that has gone silent can be given up', async () => {
      const target = await beginRemote(remote)
      const controller = new AbortController()
      const source = stallingSource(target, () => controller.abort())
      const upload = target.driver.put('a/b', source, { signal: controller.signal })
      await expect(upload).rejects.toMatchObject(errorOf('ABORTED'))
      expect(source.destroyed).toBe(true)
      await expectWellAgain(target)
      expect(await target.driver.stat('a/b')).toBeUndefined()
    })

    test('a source that is silent for longer than a server may be does not fail its upload', async () => {
      const target = await beginRemote(remote)
      const known: UploadBody = { size, replayable: false, open: () => pausingSource() }
      await Promise.all([
        target.driver.put('a/unknown', pausingSource()),
        target.driver.put('a/known', known),
        target.driver.put('a/first', pausingSource(0)),
      ])
      const bytes = patternBytes(0, 0, size)
      for (const key of ['a/unknown', 'a/known', 'a/first']) await expectStored(target, key, bytes)
    })

    test('a server that is slow for longer than it may be silent does not fail a download', async () => {
      const target = await beginRemote(remote)
      const body = new PatternBody({ size: DOWNLOAD_SIZE, seed: 33 })
      await target.driver.put('a/b', body)
      target.proxy.bytesPerSecond = body.size / ((2 * remote.idleTimeoutMs) / 1000)
      expect((await read(target.driver, 'a/b')).equals(bytesOf(body))).toBe(true)
    })

    test('a server that is slow for longer than it may be silent does not fail an upload', async () => {
      const target = await beginRemote(remote)
      const body = new PatternBody({ size: SLOW_SIZE, seed: 34 })
      // one that cannot be read again: a second attempt would hide that the first one was given up
      const once: UploadBody = { size: body.size, replayable: false, open: () => body.open() }
      const bodies = contract.capabilities.parallelParts ? [once, body] : [once]
      target.proxy.bytesPerSecond = SLOW_SIZE / ((2 * remote.idleTimeoutMs) / 1000)
      await Promise.all(bodies.map((body, index) => target.driver.put(`a/${index}`, body)))
      for (const index of bodies.keys()) {
        const raw = Buffer.from(await target.readRaw(`a/${index}`))
        expect(raw.equals(bytesOf(body)), 'the server holds other bytes').toBe(true)
      }
    })

    test('a reader that pauses for longer than a server may be silent does not fail its download', async () => {
      const target = await beginRemote(remote)
      const body = new PatternBody({ size: contract.largeSize, seed: 32 })
      await target.driver.put('a/large', body)
      const chunks: Buffer[] = []
      for await (const chunk of await target.driver.get('a/large')) {
        if (chunks.length === 0) await delay(2 * remote.idleTimeoutMs)
        chunks.push(Buffer.from(chunk))
      }
      expect(Buffer.concat(chunks).equals(bytesOf(body))).toBe(true)
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

    /** A source that is silent for twice the time that a server may be. */
    function pausingSource(bytes = size / 2): Readable {
      const over = Promise.withResolvers<void>()
      const onTaken = () => void setTimeout(over.resolve, 2 * remote.idleTimeoutMs)
      return troubledSource({ kind: 'wait', resumed: over.promise, size }, { bytes, onTaken })
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
