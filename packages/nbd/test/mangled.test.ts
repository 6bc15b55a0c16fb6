import type { Socket } from 'node:net'
import { FUZZ_TIMEOUT_MS, fuzz } from '@varve/testkit'
import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { type ExtentMap, NbdClient, NbdError } from '../src/index.ts'
import {
  type FakeConnection,
  type FakeRequest,
  FakeServer,
  MULTI_CONN,
  patternDisk,
  SEND_FLUSH,
} from './fake-server.ts'

const SIZE = 200_000
const disk = patternDisk(SIZE)
disk.fill(0, 64_000, 96_000)
const contexts = { 'base:allocation': 3, 'qemu:dirty-bitmap:b': 4 }
const EXTENTS: Readonly<Record<string, readonly number[]>> = {
  'base:allocation': [64_000, 0, 32_000, 3, 104_000, 0],
  'qemu:dirty-bitmap:b': [1_000, 1, 199_000, 0],
}

/** What happens to the bytes of the server from a position on. */
type Damage = { at: number } & (
  | { kind: 'flip'; mask: number }
  | { kind: 'drop' | 'repeat'; count: number }
  | { kind: 'insert'; bytes: Uint8Array }
  | { kind: 'cut' }
)

const at = fc.oneof(fc.nat(1100), fc.nat(6000))
/** How the client and the server talk. */
interface Manner {
  structured: boolean
  connections: number
}

const manner: fc.Arbitrary<Manner> = fc.record({
  structured: fc.boolean(),
  connections: fc.integer({ min: 1, max: 3 }),
})
const NO_DAMAGE: Damage = { at: 1_000_000, kind: 'cut' }
const written = Buffer.alloc(3000, 0x5a)
const flip = fc.record({ at, kind: fc.constant('flip' as const), mask: fc.integer({ min: 1, max: 255 }) })
const cut = fc.record({ at, kind: fc.constant('cut' as const) })
const count = fc.integer({ min: 1, max: 40 })
const shift = fc.oneof(
  fc.record({ at, kind: fc.constantFrom('drop' as const, 'repeat' as const), count }),
  fc.record({
    at,
    kind: fc.constant('insert' as const),
    bytes: fc.uint8Array({ minLength: 1, maxLength: 40 }),
  }),
)

/** Passes bytes on with one damage, at a position among all bytes or among those that the client can check. */
function damager(
  done: Damage,
  countsData: boolean,
): (bytes: Buffer, isData: boolean, socket: Socket) => void {
  let position = 0
  return (bytes, isData, socket) => {
    if (isData && !countsData) {
      socket.write(bytes)
      return
    }
    const place = done.at - position
    position += bytes.length
    if (place < 0 || place >= bytes.length) {
      socket.write(bytes)
      return
    }
    const before = bytes.subarray(0, place)
    const after = bytes.subarray(place)
    if (done.kind === 'cut') {
      socket.end(before)
    } else if (done.kind === 'flip') {
      const flipped = Buffer.from(bytes)
      flipped[place] = (flipped[place] ?? 0) ^ done.mask
      socket.write(flipped)
    } else {
      const middle =
        done.kind === 'insert'
          ? done.bytes
          : done.kind === 'repeat'
            ? after.subarray(0, done.count)
            : Buffer.alloc(0)
      socket.write(Buffer.concat([before, middle, done.kind === 'drop' ? after.subarray(done.count) : after]))
    }
  }
}

function answer(structured: boolean, request: FakeRequest, connection: FakeConnection): void {
  const { command, offset, length } = request
  if (command !== 'blockStatus' && command !== 'read') {
    connection.simple(request)
  } else if (!structured) {
    connection.simple(request, 0, disk.subarray(offset, offset + length))
  } else if (command === 'blockStatus') {
    for (const [name, id] of Object.entries(contexts)) connection.status(request, id, EXTENTS[name] ?? [])
    connection.none(request)
  } else if (offset === 64_000) {
    connection.hole(request, offset, length, true)
  } else {
    const half = Math.floor(length / 2)
    connection.data(request, offset + half, disk.subarray(offset + half, offset + length))
    connection.data(request, offset, disk.subarray(offset, offset + half), half % 2 === 0)
    if (half % 2 === 1) connection.none(request)
  }
}

function extentsOf(map: ExtentMap): number[] {
  return Array.from({ length: map.count }, (_, index) => [map.length(index), map.flags(index)]).flat()
}

/** What a client got from the server: the right things, as far as they can be checked, or a typed error. */
async function converse(
  done: Damage,
  countsData: boolean,
  timeoutMs: number,
  { structured, connections }: Manner,
): Promise<'right' | NbdError> {
  await using server = await FakeServer.start({
    export: { size: SIZE, contexts, structured, flags: SEND_FLUSH | (connections > 1 ? MULTI_CONN : 0) },
    onRequest: (request, connection) => answer(structured, request, connection),
    send: damager(done, countsData),
  })
  try {
    await using client = await NbdClient.connect(server, {
      metaContexts: Object.keys(contexts),
      timeoutMs,
      flushTimeoutMs: timeoutMs,
      connections,
      // so many requests that one connection does not take them all
      maxRequestBytes: connections > 1 ? 1001 : SIZE,
    })
    // A damaged size is as good as another; only the map of a disk of petabytes would take its time.
    const isSize = client.size === SIZE
    const maps = isSize ? client.mapExtents() : undefined
    const ranges = [
      [0, 40_000],
      [64_000, 32_000],
      [100_000, 10],
      [110_000, 40_001],
      [199_000, 1000],
    ] as const
    const reads = ranges.map(async ([offset, length]) => {
      const into = Buffer.alloc(length, 0xee)
      await client.read(offset, into)
      if (!countsData) expect(into.equals(disk.subarray(offset, offset + length))).toBe(true)
    })
    const changes = client.write(160_000, written).then(async () => {
      const stored = Buffer.alloc(SIZE)
      for (const { command, offset, data } of server.requests)
        if (command === 'write') data.copy(stored, offset)
      expect(stored.subarray(160_000, 163_000).equals(written)).toBe(true)
      await client.flush()
    })
    const outcomes = await Promise.allSettled([...reads, maps, changes])
    if (!countsData && isSize && outcomes.every(({ status }) => status === 'fulfilled')) {
      // A server that seems to refuse a context is to be believed; what it tells of the others is right.
      for (const [name, map] of (await maps) ?? []) expect(extentsOf(map)).toEqual(EXTENTS[name])
    }
    for (const outcome of outcomes) if (outcome.status === 'rejected') throw outcome.reason
    return 'right'
  } catch (error) {
    if (error instanceof NbdError) return error
    throw error
  }
}

describe('a conversation with damaged bytes', () => {
  it('is right when nothing is damaged', async () => {
    for (const structured of [true, false]) {
      for (const connections of [1, 3])
        expect(await converse(NO_DAMAGE, false, 60_000, { structured, connections })).toBe('right')
    }
  })

  // Bytes that are added or missing shift the data of a read, which nothing in the protocol can tell.
  it(
    'ends with the right bytes or a typed error when what the client can check is changed or cut off',
    async () => {
      const seen = new Set<string>()
      await fc.assert(
        fc.asyncProperty(fc.oneof({ weight: 4, arbitrary: flip }, cut), manner, async (done, manner) => {
          const outcome = await converse(done, false, 100, manner)
          seen.add(outcome === 'right' ? outcome : outcome.code)
        }),
        fuzz(150),
      )
      expect([...seen]).toEqual(expect.arrayContaining(['right', 'NBD_PROTOCOL']))
    },
    FUZZ_TIMEOUT_MS,
  )

  it(
    'ends, whatever is damaged',
    async () => {
      await fc.assert(
        fc.asyncProperty(fc.oneof(flip, cut, shift), manner, async (done, manner) => {
          await converse(done, true, 100, manner)
        }),
        fuzz(150),
      )
    },
    FUZZ_TIMEOUT_MS,
  )
})
