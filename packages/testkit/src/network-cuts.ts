import { type ByteRange, bytesBody, type StorageDriver } from '@varve/core'
import { expect } from 'vitest'
import { listed, type RemoteTarget, rawNames, read } from './contract-target.ts'
import type { ProxyDirection } from './network-proxy.ts'
import { patternBytes } from './pattern.ts'
import { PatternBody } from './pattern-body.ts'
import { expectNetworkError, type Outcome, outcomeOf, type Remote, settle } from './remote-target.ts'

/** The seed of the object whose upload and download are cut. */
const SEED = 21
/** An upload that is cut mostly waits: for the server to notice, and before it is tried again. */
const TRIALS_AT_ONCE = 4
const DIRECTIONS: readonly ProxyDirection[] = ['toServer', 'toClient']
/** How many objects there are to list while the connection is cut. */
const LISTED = 5

/** Where a call is cut in what it has the network carry in one direction. */
interface Places {
  /** How many cuts at even distances, the first before the first byte. */
  readonly even: number
  /** So many bytes before the end, where an upload is published. 0 is right behind the last byte. */
  readonly beforeEnd: readonly number[]
}

/** Where a call is cut that is made over and over, each time cut at another place. */
export interface Cuts extends Partial<Record<ProxyDirection, Places>> {
  /** Whether the connection is reset, or one direction of it ends in order, as if all had been sent. */
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
    return carried(target, () => upload(target.driver))
  })
  const points = cutPoints(total, cuts, remote)
  const waiting = [...points]
  const met: CutPoint[] = []
  const bytes = cutBytes(remote)
  const tryNext = async () => {
    for (let point = waiting.pop(); point !== undefined; point = waiting.pop()) await tryAt(point)
  }
  const tryAt = (point: CutPoint) =>
    tryOn(remote, async target => {
      await prepare(target)
      const { proxy } = target
      const before = proxy.cuts
      cutLater(target, point, cuts)
      const outcome = await outcomeOf(upload(target.driver))
      if (proxy.cuts > before) met.push(point)
      proxy.heal()
      if ('value' in outcome) await expectHeld(target, bytes)
      else expectNetworkError(outcome.error, remote)
      const kept = 'value' in outcome ? bytes : former
      await settle(() => expectAlone(target, kept))
    })
  await Promise.all(Array.from({ length: TRIALS_AT_ONCE }, tryNext))
  expectCuts(met, points)
}

/** Does something with a target for one of several trials in a test. */
async function tryOn<T>(remote: Remote, trial: (target: RemoteTarget) => Promise<T>): Promise<T> {
  const target = await remote.create()
  try {
    return await trial(target)
  } finally {
    target.proxy.heal()
    await target.dispose()
  }
}

/** Expects the server to hold these bytes as the object. What a driver reads of its server is tried elsewhere. */
async function expectHeld(target: RemoteTarget, bytes: Buffer): Promise<void> {
  const raw = Buffer.from(await target.readRaw('a/object'))
  expect(raw.equals(bytes), 'the server holds other bytes').toBe(true)
}

/** Expects the server to hold these bytes as the object, or no object, and nothing unfinished beside it. */
async function expectAlone(target: RemoteTarget, bytes: Buffer | undefined): Promise<void> {
  expect(await rawNames(target)).toEqual(bytes ? ['a/object'] : [])
  if (bytes) await expectHeld(target, bytes)
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
    remote,
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
  remote: Remote,
  cuts: Cuts,
  call: () => Promise<T>,
  look: (outcome: Outcome<T>) => void,
): Promise<void> {
  const { proxy } = target
  const points = cutPoints(await carried(target, call), cuts, remote)
  const met: CutPoint[] = []
  for (const point of points) {
    const before = proxy.cuts
    cutLater(target, point, cuts)
    const outcome = await outcomeOf(call())
    if (proxy.cuts > before) met.push(point)
    proxy.heal()
    look(outcome)
  }
  expectCuts(met, points)
  look({ value: await call() })
}

/** How many bytes a call has the network carry in either direction. */
async function carried(
  { proxy }: RemoteTarget,
  call: () => Promise<unknown>,
): Promise<Record<ProxyDirection, number>> {
  const { bytesToServer, bytesToClient } = proxy
  await call()
  const total = {
    toServer: proxy.bytesToServer - bytesToServer,
    toClient: proxy.bytesToClient - bytesToClient,
  }
  expect(Math.min(total.toServer, total.toClient), 'the driver goes around the proxy').toBeGreaterThan(0)
  return total
}

/** A place where a call is cut. */
interface CutPoint {
  readonly direction: ProxyDirection
  readonly bytes: number
  /** Whether it gets there: it does not always carry the same number of bytes, so a cut near its end may come too late. */
  readonly certain: boolean
}

function cutPoints(total: Record<ProxyDirection, number>, cuts: Cuts, { mostCuts }: Remote): CutPoint[] {
  return DIRECTIONS.flatMap(direction => {
    const places = cuts[direction]
    return places ? thinned(pointsIn(direction, total[direction], places), mostCuts) : []
  })
}

function pointsIn(direction: ProxyDirection, total: number, { even, beforeEnd }: Places): CutPoint[] {
  const evenly = Array.from({ length: even }, (_, index) => Math.floor((total * index) / even))
  const late = beforeEnd.map(distance => total - distance).filter(bytes => bytes > 0)
  const all = [...new Set([...evenly, ...late])].sort((a, b) => a - b)
  return all.map(bytes => ({ direction, bytes, certain: evenly.includes(bytes) }))
}

/** So many of the points, and evenly; the last is always one of them, the first is the first to go. */
function thinned(points: CutPoint[], most: number): CutPoint[] {
  if (points.length <= most) return points
  const chosen = Array.from(
    { length: most },
    (_, index) => Math.floor(((index + 1) * points.length) / most) - 1,
  )
  return points.filter((_, index) => chosen.includes(index))
}

/**
 * Half of those that are certain is enough: a server that was slow while the call was measured had it carry more. Of the
 * others any may come too late.
 */
function expectCuts(met: readonly CutPoint[], tried: readonly CutPoint[]): void {
  for (const direction of DIRECTIONS) {
    const certain = tried.filter(point => point.direction === direction && point.certain)
    const least = certain.length / 2
    const cut = met.filter(point => point.direction === direction)
    expect(cut.length, `too few connections were cut ${direction}`).toBeGreaterThanOrEqual(least)
  }
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

function cutLater({ proxy }: RemoteTarget, { bytes, direction }: CutPoint, { how }: Cuts): void {
  if (how === 'reset') proxy.cutAfter(bytes, direction)
  else proxy.endAfter(bytes, direction)
}
