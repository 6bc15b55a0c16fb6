import { once } from 'node:events'
import { buffer } from 'node:stream/consumers'
import { bytesBody } from '@varve/core'
import { expect, test } from 'vitest'
import { bytesOf, type Contract, expectStored, place } from './contract-target.ts'
import { patternBytes } from './pattern.ts'
import { PatternBody } from './pattern-body.ts'
import {
  beginRemote,
  cleanUpAll,
  expectNetworkError,
  expectWholeOrNothing,
  outcomeOf,
  type Remote,
} from './remote-target.ts'
import { troubledSource } from './troubled-source.ts'

const STREAM_SIZE = 3_000_000

/** A server that is killed while it is at work, and comes back. */
export function describeRestart(contract: Contract, remote: Remote): void {
  test('a server that is killed and comes back has whole objects or none, and takes the next calls', async () => {
    const target = await beginRemote(remote)
    const { driver } = target
    const former = new PatternBody({ size: contract.largeSize, seed: 41 })
    await place(target, 'a/former', former)
    const download = await driver.get('a/former')
    await once(download, 'readable')
    download.on('error', () => undefined) // it may come before anyone reads on

    const body = new PatternBody({ size: contract.largeSize, seed: 42 })
    let restarted: Promise<void> | undefined
    const restart = () => {
      restarted ??= remote.restartServer()
      return restarted
    }
    const back = Promise.withResolvers<void>()
    const stream = troubledSource(
      { kind: 'wait', resumed: back.promise, size: STREAM_SIZE },
      { bytes: STREAM_SIZE / 2, onTaken: () => restart().then(back.resolve, back.reject) },
    )
    const [streamed, replayed] = await Promise.all([
      outcomeOf(driver.put('a/stream', stream)),
      outcomeOf(driver.put('a/replayable', body)),
    ])
    await restart()
    const downloaded = await outcomeOf(buffer(download))

    await driver.put('a/next', bytesBody(Buffer.from('next')))
    await expectStored(target, 'a/next', Buffer.from('next'))
    const whole = new Map([
      ['a/former', former.size],
      ['a/stream', STREAM_SIZE],
      ['a/replayable', body.size],
      ['a/next', 4],
    ])
    for await (const { key, size } of driver.list('')) expect(size, key).toBe(whole.get(key))
    if ('error' in downloaded) expectNetworkError(downloaded.error, remote)
    else expect(downloaded.value.equals(bytesOf(former))).toBe(true)
    await expectStored(target, 'a/former', bytesOf(former))
    const bytes = patternBytes(0, 0, STREAM_SIZE)
    await expectWholeOrNothing(target, 'a/stream', { bytes, outcome: streamed, remote })
    await expectWholeOrNothing(target, 'a/replayable', { bytes: bytesOf(body), outcome: replayed, remote })
    await cleanUpAll(driver)
  })
}
