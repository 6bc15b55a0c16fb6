import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { buffer } from 'node:stream/consumers'
import { ExtentKind, type RbdDiff, type VarveEvent } from '@varve/core'
import { execa } from 'execa'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { RbdSite } from './rbd-site.ts'
import { applyDiff } from './stream-model.ts'

const KIB = 1024
const MIB = 1024 * KIB
/** Small objects: the edges of many are met with little data. */
const OBJECT = 64 * KIB
const SMALL_OBJECTS = ['--object-size', '64K']

let site: RbdSite
beforeAll(async () => {
  site = await RbdSite.start()
})
afterAll(() => site[Symbol.asyncDispose]())

/** A stream, and what it holds. */
async function exported(image: string, snapshot: string, from?: string) {
  const { stream, diff } = site.cluster.exportDiff(image, { snapshot, ...(from !== undefined && { from }) })
  return { bytes: await buffer(stream), diff: diff() }
}

/** The runs of one kind. */
function runs({ extents }: RbdDiff, kind: ExtentKind): [start: number, length: number][] {
  return Array.from({ length: extents.count }, (_, i) => i)
    .filter(i => extents.kind(i) === kind)
    .map(i => [extents.start(i), extents.length(i)])
}

const resize = (image: string, size: number) => site.ceph.client.resize(image, size)
const takeSnapshot = (image: string, snapshot: string) => site.ceph.client.createSnapshot(image, snapshot)

/** What an image held at a snapshot. */
interface Known {
  readonly name: string | undefined
  readonly bytes: Buffer
}

/** What a full stream begins from. */
const NOTHING: Known = { name: undefined, bytes: Buffer.alloc(0) }

/** Takes a snapshot and checks the streams that lead to it, by Ceph's own library. Returns what it holds. */
async function checkedSnapshot(
  image: string,
  snapshot: string,
  parents: readonly Known[] = [NOTHING],
): Promise<Known> {
  await takeSnapshot(image, snapshot)
  const truth = await site.bytes(`${image}@${snapshot}`)
  for (const { name, bytes } of parents) {
    const stream = await exported(image, snapshot, name)
    const applied = applyDiff(stream.diff, stream.bytes, bytes)
    expect(applied.equals(truth), `${name ?? 'nothing'} to ${snapshot}`).toBe(true)
  }
  return { name: snapshot, bytes: truth }
}

test('a full stream has no record of what was never written, and zeros where all of an object reads so', async () => {
  const image = await site.create(64 * MIB)
  await site.write(
    image,
    'write -P 1 0 4M',
    'write -P 2 9M 4k',
    'write -P 3 20M 64k',
    'discard 20M 64k',
    'write -P 4 30M 1M',
    'write -z 30M 1M',
    'write -P 0 40M 64k',
  )
  await takeSnapshot(image, 'one')
  const { bytes, diff } = await exported(image, 'one')
  expect(applyDiff(diff, bytes, Buffer.alloc(0)).equals(await site.bytes(`${image}@one`))).toBe(true)
  // an object that was written to is there from its beginning to its last byte that was written
  expect(runs(diff, ExtentKind.data)).toEqual([
    [0, 4 * MIB],
    [8 * MIB, MIB + 4 * KIB],
  ])
  expect(diff.dataSize).toBe(5 * MIB + 4 * KIB)
  const empty = await site.create(16 * 1024 * MIB)
  await takeSnapshot(empty, 'one')
  expect((await exported(empty, 'one')).bytes.length).toBeLessThan(100)
})

test.for<[string, string[]]>([
  ['with an object map', []],
  ['without an object map', ['--image-feature', 'layering']],
])(
  'an increment of an image %s tells what was written, and trimmed and zeroed ranges as zeros',
  async ([, options]) => {
    const image = await site.create(16 * MIB, ...options)
    await site.write(image, 'write -P 1 0 16M')
    const one = await checkedSnapshot(image, 'one')
    await site.write(
      image,
      'write -P 2 64k 4k',
      'discard 1M 512k',
      'discard 4M 4M',
      'write -z 9M 64k',
      'write -z -u 10M 64k',
      'write -P 0 11M 64k',
      'discard 15M 1M',
    )
    await checkedSnapshot(image, 'two', [one])
    const { diff } = await exported(image, 'two', 'one')
    expect(runs(diff, ExtentKind.data)).toEqual([[64 * KIB, 4 * KIB]])
    expect(runs(diff, ExtentKind.zero)).toEqual([
      [MIB, 512 * KIB],
      [4 * MIB, 4 * MIB],
      [9 * MIB, 64 * KIB],
      [10 * MIB, 64 * KIB],
      [11 * MIB, 64 * KIB],
      [15 * MIB, MIB],
    ])
    await takeSnapshot(image, 'three')
    const unchanged = await exported(image, 'three', 'two')
    expect(unchanged.diff.extents.count).toBe(1)
    expect(unchanged.bytes.length).toBeLessThan(100)
  },
)

test('what a shrunk, grown, or shrunk and grown image holds is told, to the byte', async () => {
  const image = await site.create(16 * OBJECT, ...SMALL_OBJECTS)
  await site.write(image, `write -P 1 0 ${16 * OBJECT}`)
  const whole = await checkedSnapshot(image, 'whole')
  await resize(image, 5 * OBJECT + 1000)
  const shrunk = await checkedSnapshot(image, 'shrunk', [whole])
  await resize(image, 12 * OBJECT + 512)
  const grown = await checkedSnapshot(image, 'grown', [NOTHING, whole, shrunk])
  await site.write(image, `write -P 2 ${11 * OBJECT} ${OBJECT + 512}`)
  const written = await checkedSnapshot(image, 'written', [whole, grown])
  await resize(image, 3 * OBJECT)
  await resize(image, 20 * OBJECT)
  await checkedSnapshot(image, 'regrown', [NOTHING, shrunk, written])
  // the one in between is gone, as after a rolling window has moved on
  await site.ceph.client.removeSnapshots(image, 'shrunk', 'written')
  await resize(image, 16 * OBJECT)
  const last = await checkedSnapshot(image, 'last', [whole, grown])
  const { diff } = await exported(image, 'last', 'whole')
  expect(last.bytes.subarray(3 * OBJECT).every(byte => byte === 0)).toBe(true)
  expect(runs(diff, ExtentKind.zero)).toEqual([[3 * OBJECT, 13 * OBJECT]])
})

test('a clone is exported with what it has of its parent, also once it is made independent', async () => {
  const { ceph } = site
  const parent = await site.create(8 * OBJECT, ...SMALL_OBJECTS)
  await site.write(parent, `write -P 1 0 ${3 * OBJECT}`, `write -P 2 ${6 * OBJECT} 4k`)
  await takeSnapshot(parent, 'base')
  const clone = site.newImage()
  const clones = ['clone', '--rbd-default-clone-format', '2', ...SMALL_OBJECTS]
  await ceph.run('rbd', ...clones, `${parent}@base`, clone)
  const untouched = await checkedSnapshot(clone, 'untouched')
  expect(untouched.bytes.equals(await site.bytes(`${parent}@base`))).toBe(true)
  await site.write(clone, 'write -P 3 4k 4k', `discard ${OBJECT} ${OBJECT}`, `write -z ${2 * OBJECT} 8k`)
  const touched = await checkedSnapshot(clone, 'touched', [NOTHING, untouched])
  await resize(clone, 2 * OBJECT + 512)
  await resize(clone, 8 * OBJECT) // the parent's data does not come back
  const resized = await checkedSnapshot(clone, 'resized', [untouched, touched])
  await ceph.run('rbd', 'flatten', '--no-progress', clone)
  await site.write(clone, `write -P 4 ${7 * OBJECT} 4k`)
  await checkedSnapshot(clone, 'flat', [NOTHING, touched, resized])
})

test('an object map that is wrong misleads no increment', async () => {
  const { ceph } = site
  const image = await site.create(4 * MIB, ...SMALL_OBJECTS)
  await site.write(image, 'write -P 1 0 4M')
  const one = await checkedSnapshot(image, 'one')
  const { id } = await site.cluster.image(image)
  await ceph.run('rados', '-p', 'vms', 'get', `rbd_object_map.${id}`, join(ceph.folder, 'map'))
  await site.write(image, 'write -P 2 1M 1M', 'discard 2M 1M')
  const two = await site.takeSnapshot(image, 'two')
  // as if nothing had been written between the two
  const hex = two.id.toString(16).padStart(16, '0')
  await ceph.run('rados', '-p', 'vms', 'put', `rbd_object_map.${id}.${hex}`, join(ceph.folder, 'map'))
  const truth = await site.bytes(`${image}@two`)
  const { bytes, diff } = await exported(image, 'two', 'one')
  expect(applyDiff(diff, bytes, one.bytes).equals(truth)).toBe(true)
  // the map is looked at where whole objects are compared: so it is the wrong one that was put there
  const args = ['--conf', ceph.conf, 'export-diff', '--no-progress', '--whole-object', '--from-snap', 'one']
  const { stdout } = await execa('rbd', [...args, `${image}@two`, '-'], { encoding: 'buffer' })
  expect(stdout.length).toBeLessThan(100)
})

/** Random numbers of 32 bits that are the same each time (xorshift32). */
function randomNumbers(seed: number): (below: number) => number {
  let state = seed
  return below => {
    state ^= state << 13
    state ^= state >>> 17
    state ^= state << 5
    return (state >>> 0) % below
  }
}

test.for<[string, string[]]>([
  ['a plain image', SMALL_OBJECTS],
  [
    'a striped image with its data in another pool',
    [...SMALL_OBJECTS, '--stripe-unit', '16K', '--stripe-count', '3', '--data-pool', 'data'],
  ],
  [
    'a journaled image without an object map',
    [...SMALL_OBJECTS, '--image-feature', 'exclusive-lock', '--image-feature', 'journaling'],
  ],
])('streams of random changes lead to what %s holds', async ([name, options]) => {
  if (options.includes('data')) await site.ceph.createRbdPool('data')
  const random = randomNumbers(0x5eed + name.length)
  let size = 16 * OBJECT
  const image = await site.create(size, ...options)
  const known = [NOTHING]
  for (let step = 0; step < 3; step++) {
    const changes = Array.from({ length: 10 }, () => {
      const kind = ['write -P 0', `write -P ${1 + random(255)}`, 'write -z', 'write -z -u', 'discard'][
        random(5)
      ]
      const length = Math.min(size, [512, 4096, OBJECT / 2, OBJECT, 3 * OBJECT][random(5)] ?? 0)
      const start = random((size - length) / 512 + 1) * 512
      return `${kind} ${start} ${length}`
    })
    await site.write(image, ...changes)
    if (step > 0) {
      size = [5 * OBJECT + 512, 9 * OBJECT, 16 * OBJECT, 20 * OBJECT + 4096][random(4)] ?? size
      await resize(image, size)
    }
    known.push(await checkedSnapshot(image, `s${step}`, known.slice(-2)))
  }
})

test.for<[string, string[]]>([
  ['with an exclusive lock', []],
  ['without one', ['--image-feature', 'layering']],
])(
  'a snapshot under writes of QEMU, %s, has all that was flushed and nothing that came after',
  async ([, options]) => {
    const { ceph, cluster } = site
    const image = await site.create(4 * MIB, ...options)
    const path = `rbd:${image}:conf=${ceph.conf}`
    const writer = execa('qemu-io', ['-t', 'writeback', '-f', 'raw', path], { stdin: 'pipe' })
    const answers = createInterface(writer.stdout)[Symbol.asyncIterator]()
    let flushed = 0
    const begun = Promise.withResolvers<void>()
    let isTaken = false
    const writeAll = async () => {
      for (let i = 0; !isTaken && (i + 1) * 512 <= 4 * MIB; i++) {
        writer.stdin.write(`write -P ${1 + (i % 255)} ${i * 512} 512\nflush\n`)
        while (!(await answers.next()).value?.includes('wrote')) {
          // the prompts, and how fast the last one was
        }
        flushed = i // this write's answer comes after the flush before it
        if (flushed > 0) begun.resolve()
      }
      writer.stdin.end()
      await writer
    }
    const taken: { name: string; atLeast: number; atMost: number }[] = []
    const takeSnapshots = async () => {
      await begun.promise
      for (const name of ['one', 'two']) {
        const atLeast = flushed
        await cluster.createSnapshot(image, name)
        taken.push({ name, atLeast, atMost: flushed + 2 })
      }
      isTaken = true
    }
    await Promise.all([writeAll(), takeSnapshots()])
    expect(taken.at(-1)?.atLeast).toBeGreaterThan(0)
    for (const { name, atLeast, atMost } of taken) {
      const bytes = await site.bytes(`${image}@${name}`)
      let there = 0
      while (bytes[there * 512] === 1 + (there % 255)) there++
      expect(there).toBeGreaterThanOrEqual(atLeast)
      expect(there).toBeLessThanOrEqual(atMost)
      expect(bytes.subarray(there * 512).every(byte => byte === 0)).toBe(true)
    }
  },
)

test('an export that fails before it is read ends nothing, and tells why once it is', async () => {
  const image = await site.create(MIB)
  await takeSnapshot(image, 'one')
  const ended = Promise.withResolvers<void>()
  const onEvent = ({ type }: VarveEvent) => type === 'command' && ended.resolve()
  const { stream } = site.cluster.exportDiff(image, { snapshot: 'one', from: 'gone' }, { onEvent })
  await ended.promise
  await new Promise(resolve => setImmediate(resolve))
  await expect(buffer(stream)).rejects.toMatchObject({
    code: 'RBD_SNAPSHOT_NOT_FOUND',
    message: expect.stringContaining('no snapshot gone or one'),
  })
})
