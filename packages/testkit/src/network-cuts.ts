import { type ByteRange, bytesBody, type StorageDriver } from '@varve/core'
import { expect } from 'vitest'
import { listed, type RemoteTarget, read } from './contract-target.ts'
import type { ProxyDirection } from './network-proxy.ts'
import { patternBytes } from './pattern.ts'
import { PatternBody } from './pattern-body.ts'
import {
  expectNetworkError,
  expectWholeOrNothing,
  type Outcome,
  outcomeOf,
  type Remote,
  tryOn,
} from './remote-target.ts'

/** The seed of the object whose upload and download are cut. */
const SEED = 21
/** An upload that is cut mostly waits: for the server to notice, and before it is tried again. */
const TRIALS_AT_ONCE = 3
/** How many objects there are to list while the connection is cut. */
const LISTED = 12

/** Where one call after the other is cut in what it has the network carry in one direction. */
export interface Cuts {
  readonly direction: ProxyDirection
  /** How many cuts at even distances, the first before the first byte. */
  readonly even: number
  /** So many bytes before the end, where an upload is published. 0 is right behind the last byte. */
  readonly beforeEnd: readonly number[]
  /** Whether the connection is reset, or this direction of it ends in order, as if all had been sent. */
  readonly how: 'reset' | 'end'
}

/**
 * Uploads an object over and over, each time cut at another place: it is whole, or it fails and leaves nothing, or the
 * former object.
 */
export async function cutUploads(
  remote: Remote,
  cuts: Cuts,
  { former, replayable = true }: { former?: Buffer; replayable?: boolean } = {},
): Promise<void> {
  const body = { size: remote.cutSize, seed: SEED, chunkSize: 64 * 1024, replayable }
  const upload = (driver: StorageDriver) => driver.put('a/object', new PatternBody(body))
  const prepare = async ({ driver }: RemoteTarget) => {
    if (former) await driver.put('a/object', bytesBody(former))
  }
  const total = await tryOn(remote, async target => {
    await prepare(target)
    return carried(target, cuts.direction, () => upload(target.driver))
  })
  let done = 0
  const waiting = cutPoints(total, cuts)
  const tryNext = async () => {
    for (let point = waiting.pop(); point !== undefined; point = waiting.pop()) await tryAt(point)
  }
  const tryAt = (point: number) =>
    tryOn(remote, async target => {
      await prepare(target)
      cutLater(target, point, cuts)
      const outcome = await outcomeOf(upload(target.driver))
      done += target.proxy.cuts
      target.proxy.heal()
      await expectWholeOrNothing(target, 'a/object', {
        bytes: cutBytes(remote),
        outcome,
        remote,
        ...(former && { former }),
      })
    })
  await Promise.all(Array.from({ length: TRIALS_AT_ONCE }, tryNext))
  expectCuts(done, cuts)
}

/** The bytes of the object that {@link cutUploads} uploads, and {@link cutDownloads} reads. */
export function cutBytes({ cutSize }: Remote): Buffer {
  return patternBytes(SEED, 0, cutSize)
}

/** Cuts the download of an object of {@link cutBytes} at many places: the right bytes come, or it fails. */
export async function cutDownloads(
  target: RemoteTarget,
  remote: Remote,
  download: { key: string; range: ByteRange; cuts: Cuts },
): Promise<void> {
  const { key, range, cuts } = download
  const expected = cutBytes(remote).subarray(range.start, range.end)
  await cutCalls(
    target,
    cuts,
    () => read(target.driver, key, range),
    outcome => {
      if ('error' in outcome) return expectNetworkError(outcome.error, remote)
      expect(outcome.value.equals(expected), `${outcome.value.length} bytes came`).toBe(true)
    },
  )
}

/** Cuts a call that changes nothing at many places, and looks at each outcome. */
export async function cutCalls<T>(
  target: RemoteTarget,
  cuts: Cuts,
  call: () => Promise<T>,
  look: (outcome: Outcome<T>) => void,
): Promise<void> {
  const { proxy } = target
  const points = cutPoints(await carried(target, cuts.direction, call), cuts)
  const before = proxy.cuts
  for (const point of points) {
    cutLater(target, point, cuts)
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

/** Calls that change nothing, each with a function that looks whether what came of it is right or an error of the network. */
export async function forEachAnswer(
  { driver }: RemoteTarget,
  remote: Remote,
  trial: (call: () => Promise<unknown>, look: (outcome: Outcome<unknown>) => void) => Promise<void>,
): Promise<void> {
  const keys = Array.from({ length: LISTED }, (_, index) => `a/${index}`).sort()
  await Promise.all(keys.map(key => driver.put(key, bytesBody(Buffer.from('x')))))
  const answers: [unknown, () => Promise<unknown>][] = [
    [expect.objectContaining({ key: 'a/3', size: 1 }), () => driver.stat('a/3')],
    [undefined, () => driver.stat('a/none')],
    [keys, () => listed(driver, 'a/')],
    [undefined, () => driver.delete('a/none')],
  ]
  for (const [answer, call] of answers) {
    await trial(call, outcome => {
      if ('value' in outcome) expect(outcome.value).toEqual(answer)
      else expectNetworkError(outcome.error, remote)
    })
  }
}

function cutLater({ proxy }: RemoteTarget, bytes: number, { direction, how }: Cuts): void {
  if (how === 'reset') proxy.cutAfter(bytes, direction)
  else proxy.endAfter(bytes, direction)
}
