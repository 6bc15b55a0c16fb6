import { readdir } from 'node:fs/promises'
import { Readable } from 'node:stream'
import { buffer } from 'node:stream/consumers'
import { bytesBody } from '@varve/core'
import { FtpDriver } from '@varve/driver-ftp'
import { PatternBody, patternBytes, troubledSource } from '@varve/testkit'
import { openFtpTunnel } from '@varve/testkit/lab'
import { describe, expect, test } from 'vitest'
import { begin, commandsOf, listed, optionsOf } from './ftp-target.ts'

const x = bytesBody(Buffer.from('x'))

/** Uploads whose sources stall in the middle: one, or all, go on when they are told to. */
function stalledUploads(driver: FtpDriver, count: number) {
  const begun = Promise.withResolvers<void>()
  const uploads = Array.from({ length: count }, () => Promise.withResolvers<void>())
  const stalled = uploads.map(({ promise: resumed }, index) =>
    driver.put(
      `stalled/${index}`,
      troubledSource({ kind: 'wait', resumed, size: 10 }, { bytes: 5, onTaken: begun.resolve }),
    ),
  )
  const resume = (only?: number) => {
    for (const [index, { resolve }] of uploads.entries()) if (only === undefined || only === index) resolve()
  }
  return { first: begun.promise, stalled, resume }
}

describe('connections', () => {
  test('are used again, and are no more than allowed', async () => {
    const { lab, driver } = await begin({}, { connections: 3 })
    await Promise.all(Array.from({ length: 20 }, (_, index) => driver.put(`a/${index}`, x)))
    await Promise.all(Array.from({ length: 20 }, (_, index) => driver.stat(`a/${index}`)))
    const commands = await commandsOf(lab)
    expect(commands.filter(verb => verb === 'USER')).toHaveLength(3)
  })

  test('stay within what the server allows, of which it says so', async () => {
    const { driver } = await begin({ config: ['max_per_ip=2'] }, { connections: 8 })
    const bodies = Array.from({ length: 10 }, (_, seed) => new PatternBody({ size: 400_000, seed }))
    await Promise.all(bodies.map(body => driver.put(`a/${body.seed}`, body)))
    expect(await listed(driver, 'a/')).toHaveLength(10)
  })

  test('one is enough', async () => {
    const { driver } = await begin({ config: ['max_clients=1'] }, { connections: 1 })
    await Promise.all([driver.put('a', x), driver.put('b', x), driver.stat('c')])
    expect((await driver.check()).ok).toBe(true)
  })

  test('a look-up and a short download do not wait for uploads whose source stalls; a long one is next, and says that it waits', async () => {
    const { driver } = await begin({ config: ['max_per_ip=2'] }, { connections: 2 })
    const body = new PatternBody({ size: 3_000_000, seed: 8 })
    await driver.put('object', body)
    const { first, stalled, resume } = stalledUploads(driver, 3)
    await first
    expect(await driver.stat('a')).toBeUndefined()
    expect(await listed(driver, '')).toHaveLength(1)
    const range = { start: 1_000_000, end: 2_000_000 }
    expect(
      (await buffer(await driver.get('object', { range }))).equals(patternBytes(8, 1_000_000, 1_000_000)),
    ).toBe(true)
    const waits: boolean[] = []
    const download = driver.get('object', { onWait: wait => void waits.push(wait) })
    await expect.poll(() => waits).toEqual([true])
    resume(0)
    expect((await buffer(await download)).equals(patternBytes(8, 0, 3_000_000))).toBe(true)
    expect(waits).toEqual([true, false])
    resume()
    await Promise.all(stalled)
  })

  test('one is left to downloads, however many uploads there are', async () => {
    const { driver } = await begin({})
    const body = new PatternBody({ size: 3_000_000, seed: 9 })
    await driver.put('object', body)
    const { first, stalled, resume } = stalledUploads(driver, 4)
    await first
    expect((await buffer(await driver.get('object'))).equals(patternBytes(9, 0, 3_000_000))).toBe(true)
    resume()
    await Promise.all(stalled)
  })

  test('that the server has closed for being idle are replaced', async () => {
    const { lab, driver } = await begin({})
    await driver.put('a', x)
    await lab.restart()
    expect(await driver.stat('a')).toMatchObject({ size: 1 })
  })
})

describe('uploads that break', () => {
  test('go on where they broke off, and not from the beginning', async () => {
    const { lab } = await begin({})
    await using tunnel = await openFtpTunnel(lab)
    await using driver = new FtpDriver({ ...(await optionsOf(lab, 'none')), host: tunnel.host })
    const body = new PatternBody({ size: 6_000_000, seed: 4 })
    tunnel.proxy.cutAfter(4_000_000, 'toServer')
    await driver.put('a', body)
    expect(tunnel.proxy.cuts).toBe(1)
    expect(await commandsOf(lab)).toContain('REST')
    expect((await buffer(await driver.get('a'))).equals(patternBytes(4, 0, 6_000_000))).toBe(true)
  })

  test('go on with a stream that opens once when the server gave up waiting for its source', async () => {
    const { lab, driver } = await begin({ config: ['data_connection_timeout=1'] })
    const ended = Promise.withResolvers<void>()
    const onTaken = async () => {
      await expect.poll(() => lab.log(), { timeout: 20_000 }).toMatch(/FAIL UPLOAD|421 Data timeout/)
      ended.resolve()
    }
    const source = troubledSource(
      { kind: 'wait', resumed: ended.promise, size: 2_000_000 },
      { bytes: 1_000_000, onTaken: () => onTaken().catch(ended.reject) },
    )
    await driver.put('a', source)
    expect((await buffer(await driver.get('a'))).equals(patternBytes(0, 0, 2_000_000))).toBe(true)
    expect(await commandsOf(lab)).toContain('REST')
  })

  test('of a stream that opens once fail with the reason and leave nothing, when bytes were lost', async () => {
    const { lab } = await begin({})
    await using tunnel = await openFtpTunnel(lab)
    await using driver = new FtpDriver({ ...(await optionsOf(lab, 'none')), host: tunnel.host })
    tunnel.proxy.cutAfter(1_000_000, 'toServer')
    const source = Readable.from([patternBytes(0, 0, 1_500_000), patternBytes(0, 1_500_000, 1_500_000)])
    await expect(driver.put('a', source)).rejects.toMatchObject({ code: 'UPLOAD_FAILED' })
    expect(await readdir(lab.home)).toEqual([])
  })
})
