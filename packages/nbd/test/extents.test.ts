import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { ExtentMapBuilder, MAX_EXTENTS } from '../src/extent-map.ts'
import { type ExtentMap, NbdClient } from '../src/index.ts'
import { FakeServer } from './fake-server.ts'

const BLOCK = 512
const CONTEXTS = { 'base:allocation': 1, 'qemu:dirty-bitmap:a': 2, 'qemu:dirty-bitmap:b': 7 }

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

describe('mapping extents', () => {
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
    expect(server.requests.length).toBe(Math.ceil(2 ** 44 / 0xffff0000))
  })

  it('is empty for an empty export and without contexts', async () => {
    await using server = await FakeServer.start({ export: { size: 0, contexts: { 'base:allocation': 1 } } })
    await using client = await NbdClient.connect(server, { metaContexts: ['base:allocation'] })
    expect((await client.mapExtents()).get('base:allocation')?.count).toBe(0)
    await using without = await NbdClient.connect(server)
    expect((await without.mapExtents()).size).toBe(0)
  })

  it('holds a million extents in twelve bytes each', () => {
    const builder = new ExtentMapBuilder(2 ** 40)
    for (let index = 0; index < 2 ** 20; index++) builder.append(index * 2 ** 20, 2 ** 20, index % 2)
    const map = builder.build()
    expect(map.count).toBe(2 ** 20)
    expect([map.start(777_777), map.length(777_777), map.flags(777_777)]).toEqual([
      777_777 * 2 ** 20,
      2 ** 20,
      1,
    ])
  })

  it('is NBD_PROTOCOL from a number of extents on, and takes no more than 192 MiB', () => {
    const builder = new ExtentMapBuilder(Number.MAX_SAFE_INTEGER, 1000)
    for (let told = 0; told < 1000; told++) builder.append(told, 1, told % 2)
    builder.append(1000, 1, 1) // joined with the last
    expect(() => builder.append(1001, 1, 0)).toThrow(expect.objectContaining({ code: 'NBD_PROTOCOL' }))
    expect(12 * (MAX_EXTENTS + 1)).toBe(192 * 2 ** 20)
  })

  it('knows nothing of extents that are not there', () => {
    const builder = new ExtentMapBuilder(10)
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
      export: { size: 2 ** 29, contexts: { 'base:allocation': 1 } },
      onRequest: (request, connection) => connection.status(request, 1, extents, true),
    })
    await using client = await NbdClient.connect(server, { metaContexts: ['base:allocation'] })
    const map = (await client.mapExtents()).get('base:allocation')
    expect(map?.count).toBe(2 ** 20)
    expect(map?.flags(2 ** 20 - 1)).toBe(3)
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
