import { setImmediate as turn } from 'node:timers/promises'
import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import fc from 'fast-check'
import { afterEach, describe, expect, it, vi } from 'vitest'
import { ExtentMapBuilder, MAX_EXTENTS } from '../src/extent-map.ts'
import { type ExtentMap, NbdClient } from '../src/index.ts'
import { FakeServer } from './fake-server.ts'

const BLOCK = 512
const CONTEXTS = { 'base:allocation': 1, 'qemu:dirty-bitmap:a': 2, 'qemu:dirty-bitmap:b': 7 }

const MIB = 2 ** 20
setFlagsFromString('--expose-gc')
const collectGarbage: () => void = runInNewContext('gc')

/** The bytes of all array buffers that are in use. */
async function arrayBytes(): Promise<number> {
  for (let round = 0; round < 2; round++) {
    collectGarbage()
    await turn() // what was collected is freed beside
  }
  return process.memoryUsage().arrayBuffers
}

/** The flags of every block, as the map tells them. */
function flagsOfBlocks(map: ExtentMap | undefined, blocks: number): number[] {
  const flags: number[] = []
  for (let index = 0; map && index < map.count; index++) {
    expect(map.start(index)).toBe(flags.length * BLOCK)
    for (let left = map.length(index); left > 0; left -= BLOCK) flags.push(map.flags(index))
  }
  expect(flags.length).toBe(blocks)
  return flags
}

/** The extent that a byte is in. */
function indexAt(map: ExtentMap, byte: number): number {
  let index = 0
  while (index + 1 < map.count && map.start(index + 1) <= byte) index++
  return index
}

describe('mapping extents', () => {
  afterEach(() => {
    vi.useRealTimers()
  })

  it('tells what the server knows of every block, however short its replies are', async () => {
    const blocks = fc.integer({ min: 1, max: 60 })
    const flags = fc.array(fc.constantFrom(0, 1, 3), { minLength: 60, maxLength: 60 })
    await fc.assert(
      fc.asyncProperty(
        blocks,
        fc.tuple(flags, flags, flags),
        fc.nat(511),
        fc.infiniteStream(fc.nat()),
        async (count, truth, cut, stream) => {
          const random = () => stream.next().value ?? 0
          const size = count * BLOCK - cut
          await using server = await FakeServer.start({
            export: { size, blockSize: [BLOCK, 4096, 65536], contexts: CONTEXTS },
            onRequest: (request, connection) => {
              const first = request.offset / BLOCK
              Object.values(CONTEXTS).forEach((id, index) => {
                // Each context is told of in a part of its own, in extents that may have equal neighbours and may end late.
                const last = first + 1 + (random() % Math.ceil(request.length / BLOCK))
                const extents: number[] = []
                for (let block = first; block < last; block++) {
                  const flag = truth[index]?.[block] ?? 0
                  const before = extents.length
                  if (before > 0 && extents[before - 1] === flag && random() % 2 === 0)
                    extents[before - 2] = (extents[before - 2] ?? 0) + BLOCK
                  else extents.push(BLOCK, flag)
                }
                connection.status(request, id, extents)
              })
              connection.none(request)
            },
          })
          await using client = await NbdClient.connect(server, { metaContexts: Object.keys(CONTEXTS) })
          const maps = await client.mapExtents()
          Object.keys(CONTEXTS).forEach((name, index) => {
            const map = maps.get(name)
            expect(flagsOfBlocks(map, count)).toEqual(truth[index]?.slice(0, count))
            for (let at = 1; map && at < map.count; at++) expect(map.flags(at)).not.toBe(map.flags(at - 1))
            expect(map && map.start(map.count - 1) + map.length(map.count - 1)).toBe(size)
          })
        },
      ),
      { numRuns: 60 },
    )
  }, 60_000)

  it('asks for less than 4 GiB at a time, in whole blocks', async () => {
    await using server = await FakeServer.start({
      export: { size: 2 ** 44, blockSize: [65536, 65536, 2 ** 25], contexts: { 'base:allocation': 1 } },
      onRequest: (request, connection) => connection.status(request, 1, [request.length, 3], true),
    })
    await using client = await NbdClient.connect(server, { metaContexts: ['base:allocation'] })
    const map = (await client.mapExtents()).get('base:allocation')
    expect([map?.count, map?.start(0), map?.length(0), map?.flags(0)]).toEqual([1, 0, 2 ** 44, 3])
    for (const { offset, length } of server.requests) expect([offset % 65536, length % 65536]).toEqual([0, 0])
    const lengths = server.requests.map(({ length }) => length)
    expect(lengths.slice(0, 8).map(length => length / MIB)).toEqual([
      64, 128, 256, 512, 1024, 2048, 4095.9375, 4095.9375,
    ])
    expect(lengths.length).toBe(6 + Math.ceil((2 ** 44 - 4032 * MIB) / 0xffff0000))
  })

  it('asks for less as long as the server takes its time to answer', async () => {
    vi.useFakeTimers({ toFake: ['performance'] })
    await using server = await FakeServer.start({
      export: { size: 1100 * MIB, contexts: { 'base:allocation': 1 } },
      onRequest: (request, connection) => {
        // On a slow disk, between 192 and 700 MiB.
        if (request.offset >= 192 * MIB && request.offset < 700 * MIB) vi.advanceTimersByTime(1000)
        connection.status(request, 1, [request.length, 3], true)
      },
    })
    await using client = await NbdClient.connect(server, { metaContexts: ['base:allocation'] })
    await client.mapExtents()
    expect(server.requests.map(({ length }) => length / MIB)).toEqual([
      64, 128, 256, 128, 64, 64, 64, 128, 204,
    ])
  })

  it('is told in pieces where that is asked for, and beside it as the server knows it', async () => {
    const extents = {
      'base:allocation': [100, 0, 4000, 3, 4092, 3],
      'qemu:dirty-bitmap:a': [4095, 0, 1, 1, 4096, 0],
      'x:depth': [1, 1, 8191, 2],
    }
    await using server = await FakeServer.start({
      export: { size: 8192, contexts: { 'base:allocation': 1, 'qemu:dirty-bitmap:a': 2, 'x:depth': 3 } },
      onRequest: (request, connection) => {
        Object.values(extents).forEach((pairs, index) => {
          connection.status(request, index + 1, pairs)
        })
        connection.none(request)
      },
    })
    await using client = await NbdClient.connect(server, { metaContexts: Object.keys(extents) })
    const told: Record<string, number[]> = {}
    const maps = await client.mapExtents({
      granularity: 4096,
      onExtent: (context, start, end, flags) => {
        told[context] = [...(told[context] ?? []), end - start, flags]
      },
    })
    expect(told).toEqual(extents)
    const runs = (name: string) => {
      const map = maps.get(name)
      return map && Array.from({ length: map.count }, (_, i) => [map.length(i), map.flags(i)])
    }
    // data where any byte is data, dirty where any is; what the third one means nobody here knows
    expect(runs('base:allocation')).toEqual([
      [4096, 0],
      [4096, 3],
    ])
    expect(runs('qemu:dirty-bitmap:a')).toEqual([
      [4096, 1],
      [4096, 0],
    ])
    expect(runs('x:depth')).toEqual([
      [1, 1],
      [8191, 2],
    ])
    for (const granularity of [0, 3, 4096.5, -4096, 2 ** 31])
      await expect(client.mapExtents({ granularity })).rejects.toMatchObject({ code: 'NBD_ARGUMENT' })
  })

  it('is rounded as a model does it byte by byte', () => {
    fc.assert(
      fc.property(
        fc.record({
          granularity: fc.nat(6).map(bits => 2 ** bits),
          // what lies before is one long extent
          base: fc.constantFrom(0, 2 ** 31 - 3, 2 ** 32 + 5, 2 ** 45 - 1),
          parts: fc.array(
            fc.record({ length: fc.integer({ min: 1, max: 70 }), flags: fc.nat(3), again: fc.nat(40) }),
            { minLength: 1, maxLength: 30 },
          ),
          cut: fc.nat(20),
          isUnion: fc.boolean(),
        }),
        ({ granularity, base, parts, cut, isUnion }) => {
          const truth = parts.flatMap(({ length, flags }) => new Array<number>(length).fill(flags))
          const size = base + Math.max(1, truth.length - cut)
          const join = (one: number, other: number) => (isUnion ? one | other : one & other)
          const told: [start: number, end: number, flags: number][] = []
          const builder = new ExtentMapBuilder({
            size,
            granularity,
            join,
            onExtent: (...extent) => told.push(extent),
          })
          builder.append(0, base, 2)
          let start = base
          for (const { length, flags, again } of parts) {
            // a server tells of some bytes again, and of some behind the end
            const from = Math.max(base, start - again)
            for (let at = from; at < start; at++) builder.append(at, 1, truth[at - base] ?? 0)
            builder.append(start, length, flags)
            start += length
          }
          const map = builder.build()

          const flagsAt = (byte: number) => (byte < base ? 2 : (truth[byte - base] ?? 0))
          const first = base - (base % granularity)
          for (let piece = first; piece < size; piece += granularity) {
            const last = Math.min(piece + granularity, size)
            let expected = flagsAt(piece)
            for (let byte = piece + 1; byte < last; byte++) expected = join(expected, flagsAt(byte))
            expect(map.flags(indexAt(map, piece))).toBe(expected)
          }
          for (let index = 0; index < map.count; index++) {
            expect(map.start(index) % granularity).toBe(0)
            expect(map.flags(index)).not.toBe(map.flags(index - 1))
          }
          expect([map.start(0), map.start(map.count)]).toEqual([0, size])

          let covered = 0
          for (const [from, end, flags] of told) {
            expect(from).toBe(covered)
            for (let byte = Math.max(from, base); byte < end; byte++) expect(flags).toBe(flagsAt(byte))
            covered = end
          }
          expect(covered).toBe(size)
        },
      ),
      { numRuns: 300 },
    )
  })

  it('is empty for an empty export and without contexts', async () => {
    await using server = await FakeServer.start({ export: { size: 0, contexts: { 'base:allocation': 1 } } })
    await using client = await NbdClient.connect(server, { metaContexts: ['base:allocation'] })
    expect((await client.mapExtents()).get('base:allocation')?.count).toBe(0)
    await using without = await NbdClient.connect(server)
    expect((await without.mapExtents()).size).toBe(0)
  })

  it('holds a million extents in twelve bytes each', async () => {
    const build = () => {
      const builder = new ExtentMapBuilder({ size: 2 ** 40 })
      for (let index = 0; index < 2 ** 20; index++) builder.append(index * 2 ** 20, 2 ** 20, index % 2)
      return builder.build()
    }
    const before = await arrayBytes()
    const map = build()
    expect(Math.round(((await arrayBytes()) - before) / MIB)).toBe(12)
    expect(map.count).toBe(2 ** 20)
    expect([map.start(777_777), map.length(777_777), map.flags(777_777)]).toEqual([
      777_777 * 2 ** 20,
      2 ** 20,
      1,
    ])
  })

  it('takes 192 MiB for as many extents as there may be, and one more is NBD_FRAGMENTED', async () => {
    const before = await arrayBytes()
    const builder = new ExtentMapBuilder({ size: Number.MAX_SAFE_INTEGER })
    for (let told = 0; told < MAX_EXTENTS; told++) builder.append(told, 1, told % 2)
    builder.append(MAX_EXTENTS, 1, 0) // joined with the last
    expect(Math.round(((await arrayBytes()) - before) / MIB)).toBe(192)
    expect(() => builder.append(MAX_EXTENTS + 1, 1, 1)).toThrow(
      expect.objectContaining({
        code: 'NBD_FRAGMENTED',
        context: { most: MAX_EXTENTS, granularity: 1, reached: MAX_EXTENTS + 1 },
      }),
    )
  })

  it('knows nothing of extents that are not there', () => {
    const builder = new ExtentMapBuilder({ size: 10 })
    builder.append(0, 20, 1)
    const map = builder.build()
    expect(map.length(0)).toBe(10)
    expect([map.start(2), map.length(1), map.flags(1), map.flags(-1)]).toEqual([NaN, NaN, NaN, NaN])
  })
})

describe('block status', () => {
  it('tells each context in its own part, cut off at the end of the range', async () => {
    await using server = await FakeServer.start({
      export: {
        size: 2 ** 20,
        blockSize: [BLOCK, 4096, 65536],
        contexts: { 'base:allocation': 1, 'x:y': 2 },
      },
      onRequest: (request, connection) => {
        connection.status(request, 2, [512, 5])
        connection.status(request, 1, [512, 0, 1024, 3], true)
      },
    })
    await using client = await NbdClient.connect(server, { metaContexts: ['base:allocation', 'x:y'] })
    const status = await client.blockStatus(512, 1024)
    expect(status.get('x:y')).toEqual([{ length: 512, flags: 5 }])
    expect(status.get('base:allocation')).toEqual([
      { length: 512, flags: 0 },
      { length: 512, flags: 3 },
    ])
    expect(server.requests[0]).toMatchObject({ command: 'blockStatus', offset: 512, length: 1024, flags: 0 })
  })

  it('takes as many extents in a reply as a server may send', async () => {
    const extents = Array.from({ length: 2 ** 20 }, (_, index) => [512, index % 4]).flat()
    await using server = await FakeServer.start({
      export: { size: 960 * MIB, contexts: { 'base:allocation': 1 } },
      onRequest: (request, connection) => {
        const isLast = request.length === 512 * MIB
        connection.status(request, 1, isLast ? extents : [request.length, 3], true)
      },
    })
    await using client = await NbdClient.connect(server, { metaContexts: ['base:allocation'] })
    const map = (await client.mapExtents()).get('base:allocation')
    expect(map?.count).toBe(1 + 2 ** 20)
    expect(map?.flags(2 ** 20)).toBe(3)
  })

  it.each([
    ['of no length', 0, 0],
    ['of 4 GiB', 0, 2 ** 32],
    ['within a block', 100, 512],
    ['behind the end', 2 ** 40, 512],
  ])('refuses a range %s', async (_what, offset, length) => {
    await using server = await FakeServer.start({
      export: { size: 2 ** 40, blockSize: [BLOCK, 4096, 65536], contexts: { 'base:allocation': 1 } },
    })
    await using client = await NbdClient.connect(server, { metaContexts: ['base:allocation'] })
    await expect(client.blockStatus(offset, length)).rejects.toMatchObject({ code: 'NBD_ARGUMENT' })
    expect(server.requests).toEqual([])
  })
})
