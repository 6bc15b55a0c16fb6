import type { Readable } from 'node:stream'
import { setTimeout as delay } from 'node:timers/promises'
import type { UploadBody } from '@varve/core'
import { expect, test } from 'vitest'
import { bytesOf, type Contract, expectStored, place, read } from './contract-target.ts'
import { patternBytes } from './pattern.ts'
import { PatternBody } from './pattern-body.ts'
import { beginRemote, type Remote } from './remote-target.ts'
import { troubledSource } from './troubled-source.ts'

const DOWNLOAD_SIZE = 9_000_000
/**
 * The kernel takes up to 12 MB on the way to a slow server, at once: of so much more a driver sees that it is slow, for
 * longer than a server may be silent.
 */
const SLOW_SIZE = 30_000_000

/** Servers that are slow, which is not silent. */
export function describeSlowness({ capabilities }: Contract, remote: Remote): void {
  const twice = 2 * remote.idleTimeoutMs
  test.concurrent('a server that is slow for longer than it may be silent fails neither an upload nor a download', async context => {
    const downloading = async () => {
      const target = await beginRemote(remote, context)
      const body = new PatternBody({ size: DOWNLOAD_SIZE, seed: 33 })
      await place(target, 'a/b', body)
      target.proxy.bytesPerSecond = body.size / (twice / 1000)
      expect((await read(target.driver, 'a/b')).equals(bytesOf(body))).toBe(true)
    }
    const uploading = async () => {
      const target = await beginRemote(remote, context)
      const body = new PatternBody({ size: SLOW_SIZE, seed: 34 })
      // one that cannot be read again: a second attempt would hide that the first one was given up
      const once: UploadBody = { size: body.size, replayable: false, open: () => body.open() }
      const bodies = capabilities.parallelParts ? [once, body] : [once]
      target.proxy.bytesPerSecond = SLOW_SIZE / (twice / 1000)
      await Promise.all(bodies.map((body, index) => target.driver.put(`a/${index}`, body)))
      for (const index of bodies.keys()) {
        const raw = Buffer.from(await target.readRaw(`a/${index}`))
        expect(raw.equals(bytesOf(body)), 'the server holds other bytes').toBe(true)
      }
    }
    await Promise.all([downloading(), uploading()])
  })
}

/** Sources and readers that are silent while nothing is expected of the server. */
export function describePauses(contract: Contract, remote: Remote): void {
  const size = contract.streamSize
  const twice = 2 * remote.idleTimeoutMs
  test.concurrent('a source, or a reader, that is silent for longer than a server may be does not fail its upload or download', async context => {
    const uploading = async () => {
      const target = await beginRemote(remote, context)
      const known: UploadBody = { size, replayable: false, open: () => pausingSource() }
      await Promise.all([
        target.driver.put('a/unknown', pausingSource()),
        target.driver.put('a/known', known),
        target.driver.put('a/first', pausingSource(0)),
      ])
      const bytes = patternBytes(0, 0, size)
      for (const key of ['a/unknown', 'a/known', 'a/first']) await expectStored(target, key, bytes)
    }
    const downloading = async () => {
      const target = await beginRemote(remote, context)
      const body = new PatternBody({ size: contract.largeSize, seed: 32 })
      await place(target, 'a/large', body)
      const chunks: Buffer[] = []
      for await (const chunk of await target.driver.get('a/large')) {
        if (chunks.length === 0) await delay(twice)
        chunks.push(Buffer.from(chunk))
      }
      expect(Buffer.concat(chunks).equals(bytesOf(body))).toBe(true)
    }
    await Promise.all([uploading(), downloading()])
  })

  /** A source that is silent for twice the time that a server may be. */
  function pausingSource(bytes = size / 2): Readable {
    const over = Promise.withResolvers<void>()
    const onTaken = () => void setTimeout(over.resolve, twice)
    return troubledSource({ kind: 'wait', resumed: over.promise, size }, { bytes, onTaken })
  }
}
