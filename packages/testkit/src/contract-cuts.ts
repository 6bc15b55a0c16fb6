import { type ByteRange, bytesBody, type StorageDriver } from '@varve/core'
import { describe, expect, test } from 'vitest'
import { bytesOf, type Contract, expectStored, listed, type RemoteTarget, read } from './contract-target.ts'
import type { ProxyDirection } from './network-proxy.ts'
import { patternBytes } from './pattern.ts'
import { PatternBody } from './pattern-body.ts'
import {
  beginRemote,
  expectNetworkError,
  expectWholeOrNothing,
  type Outcome,
  outcomeOf,
  type Remote,
  tryOn,
} from './remote-target.ts'

/** Where one call after the other is cut in what it has the network carry in one direction. */
interface Cuts {
  readonly direction: ProxyDirection
  /** How many cuts at even distances, the first before the first byte. */
  readonly even: number
  /** So many bytes before the end, where an upload is published. 0 is right behind the last byte. */
  readonly beforeEnd: readonly number[]
}

/** Connections that are cut: what is stored is whole or not there, and no answer is a wrong one. */
export function describeCuts(contract: Contract, remote: Remote): void {
  describe('connections that are cut', () => {
    const bytes = patternBytes(21, 0, remote.cutSize)

    test('an upload that is cut anywhere on its way to the server is whole, or fails and leaves nothing', async () => {
      await cutUploads({ direction: 'toServer', even: 8, beforeEnd: [1024, 256, 64, 16, 1, 0] })
    })

    test('an upload that is cut anywhere in what the server answers is whole, or fails and leaves nothing', async () => {
      await cutUploads({ direction: 'toClient', even: 8, beforeEnd: [1, 0] })
    })

    test.runIf(contract.capabilities.atomicPublish)(
      'an object stays as it was when the upload that would replace it is cut and fails',
      async () => {
        const former = patternBytes(22, 0, 1000)
        await cutUploads({ direction: 'toServer', even: 2, beforeEnd: [64, 1, 0] }, { former })
        await cutUploads({ direction: 'toClient', even: 1, beforeEnd: [0] }, { former })
      },
    )

    test('a body that opens once is stored whole, or fails and leaves nothing, when its upload is cut', async () => {
      const once = { replayable: false }
      await cutUploads({ direction: 'toServer', even: 2, beforeEnd: [1, 0] }, once)
      await cutUploads({ direction: 'toClient', even: 2, beforeEnd: [1, 0] }, once)
    })

    test.runIf(contract.capabilities.resume)(
      'an upload that is cut goes on where it broke off, and does not begin again',
      async () => {
        const target = await beginRemote(remote)
        const body = new PatternBody({ size: contract.largeSize, seed: 23 })
        const before = target.proxy.bytesToServer
        target.proxy.cutAfter(0.8 * body.size, 'toServer')
        await target.driver.put('a/large', body)
        expect(target.proxy.cuts).toBe(1)
        expect(target.proxy.bytesToServer - before).toBeLessThan(1.6 * body.size)
        expect(body.faults).toEqual([])
        await expectStored(target, 'a/large', bytesOf(body))
      },
    )

    test('a download that is cut anywhere gives the right bytes or fails', async () => {
      const target = await beginRemote(remote)
      const { driver } = target
      await driver.put('a/object', bytesBody(bytes))
      const cutDownloads = (range: ByteRange, cuts: Cuts) =>
        cutCalls(
          target,
          cuts,
          () => read(driver, 'a/object', range),
          outcome => {
            if ('error' in outcome) return expectNetworkError(outcome.error, remote)
            const expected = bytes.subarray(range.start, range.end)
            expect(outcome.value.equals(expected), `${outcome.value.length} bytes came`).toBe(true)
          },
        )
      const all = { start: 0, end: bytes.length }
      await cutDownloads(all, { direction: 'toClient', even: 6, beforeEnd: [1, 0] })
      await cutDownloads(all, { direction: 'toServer', even: 2, beforeEnd: [0] })
      const middle = { start: 1001, end: bytes.length - 1001 }
      await cutDownloads(middle, { direction: 'toClient', even: 3, beforeEnd: [1] })
      await expectStored(target, 'a/object', bytes)
    })

    test('a call that is cut anywhere gives the right answer or fails', async () => {
      const target = await beginRemote(remote)
      const { driver } = target
      const keys = Array.from({ length: 30 }, (_, index) => `a/${index}`).sort()
      for (const key of keys) await driver.put(key, bytesBody(Buffer.from('x')))
      const answers: [unknown, () => Promise<unknown>][] = [
        [expect.objectContaining({ key: 'a/3', size: 1 }), () => driver.stat('a/3')],
        [undefined, () => driver.stat('a/none')],
        [keys, () => listed(driver, 'a/')],
        [undefined, () => driver.delete('a/none')],
      ]
      for (const [answer, call] of answers) {
        const look = (outcome: Outcome<unknown>) => {
          if ('value' in outcome) expect(outcome.value).toEqual(answer)
          else expectNetworkError(outcome.error, remote)
        }
        await cutCalls(target, { direction: 'toClient', even: 2, beforeEnd: [1, 0] }, call, look)
        await cutCalls(target, { direction: 'toServer', even: 0, beforeEnd: [0] }, call, look)
      }
    })

    async function cutUploads(
      cuts: Cuts,
      { former, replayable = true }: { former?: Buffer; replayable?: boolean } = {},
    ): Promise<void> {
      const body = { size: remote.cutSize, seed: 21, chunkSize: 64 * 1024, replayable }
      const upload = (driver: StorageDriver) => driver.put('a/object', new PatternBody(body))
      const prepare = async ({ driver }: RemoteTarget) => {
        if (former) await driver.put('a/object', bytesBody(former))
      }
      const total = await tryOn(remote, async target => {
        await prepare(target)
        return carried(target, cuts.direction, () => upload(target.driver))
      })
      const points = cutPoints(total, cuts)
      let done = 0
      for (const point of points) {
        await tryOn(remote, async target => {
          await prepare(target)
          target.proxy.cutAfter(point, cuts.direction)
          const outcome = await outcomeOf(upload(target.driver))
          done += target.proxy.cuts
          target.proxy.heal()
          await expectWholeOrNothing(target, 'a/object', {
            bytes,
            outcome,
            remote,
            ...(former && { former }),
          })
        })
      }
      expectCuts(done, cuts)
    }
  })
}

/** Cuts a call that changes nothing at many places, and looks at each outcome. */
async function cutCalls<T>(
  target: RemoteTarget,
  cuts: Cuts,
  call: () => Promise<T>,
  look: (outcome: Outcome<T>) => void,
): Promise<void> {
  const { proxy } = target
  const points = cutPoints(await carried(target, cuts.direction, call), cuts)
  const before = proxy.cuts
  for (const point of points) {
    proxy.cutAfter(point, cuts.direction)
    const outcome = await outcomeOf(call())
    proxy.heal()
    look(outcome)
  }
  expectCuts(proxy.cuts - before, cuts)
  look({ value: await call() })
}

/** How many bytes a call has the network carry in a direction. */
async function carried(
  { proxy }: RemoteTarget,
  direction: ProxyDirection,
  call: () => Promise<unknown>,
): Promise<number> {
  const count = () => (direction === 'toServer' ? proxy.bytesToServer : proxy.bytesToClient)
  const before = count()
  await call()
  expect(count() - before, 'the driver goes around the proxy').toBeGreaterThan(0)
  return count() - before
}

function cutPoints(total: number, { even, beforeEnd }: Cuts): number[] {
  const evenly = Array.from({ length: even }, (_, index) => Math.floor((total * index) / even))
  const late = beforeEnd.map(distance => total - distance).filter(point => point > 0)
  return [...new Set([...evenly, ...late])]
}

/**
 * A call does not always carry the same number of bytes, so a cut near its end may come too late; one of those at even
 * distances does not.
 */
function expectCuts(cuts: number, { even }: Cuts): void {
  expect(cuts, 'too few connections were cut').toBeGreaterThanOrEqual(Math.max(1, even))
}
