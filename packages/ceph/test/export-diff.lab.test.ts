import { join } from 'node:path'
import { buffer } from 'node:stream/consumers'
import { ExtentKind, type VarveEvent } from '@varve/core'
import { execa } from 'execa'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { Exports, NOTHING, OBJECT, runs, SMALL_OBJECTS } from './exports.ts'
import { RbdSite } from './rbd-site.ts'
import { applyDiff } from './stream-model.ts'

const KIB = 1024
const MIB = 1024 * KIB

let site: RbdSite
let streams: Exports
beforeAll(async () => {
  site = await RbdSite.start()
  streams = new Exports(site)
})
afterAll(() => site[Symbol.asyncDispose]())

const resize = (image: string, size: number) => site.ceph.client.resize(image, size)
const takeSnapshot = (image: string, snapshot: string) => site.ceph.client.createSnapshot(image, snapshot)

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
  const { bytes, diff } = await streams.exported(image, 'one')
  expect(applyDiff(diff, bytes, Buffer.alloc(0)).equals(await site.bytes(`${image}@one`))).toBe(true)
  // an object that was written to is there from its beginning to its last byte that was written
  expect(runs(diff, ExtentKind.data)).toEqual([
    [0, 4 * MIB],
    [8 * MIB, MIB + 4 * KIB],
  ])
  expect(diff.dataSize).toBe(5 * MIB + 4 * KIB)
  const empty = await site.create(16 * 1024 * MIB)
  await takeSnapshot(empty, 'one')
  expect((await streams.exported(empty, 'one')).bytes.length).toBeLessThan(100)
})

// Other kinds of images are in export-diff.thorough.test.ts.

test('an increment of an image without an object map tells what was written, and trimmed and zeroed ranges as zeros', () =>
  streams.checkIncrement(['without an object map', ['--image-feature', 'layering']]))

test('what a shrunk, grown, or shrunk and grown image holds is told, to the byte', async () => {
  const image = await site.create(16 * OBJECT, ...SMALL_OBJECTS)
  await site.write(image, `write -P 1 0 ${16 * OBJECT}`)
  const whole = await streams.checkedSnapshot(image, 'whole')
  await resize(image, 5 * OBJECT + 1000)
  const shrunk = await streams.checkedSnapshot(image, 'shrunk', [whole])
  await resize(image, 12 * OBJECT + 512)
  const grown = await streams.checkedSnapshot(image, 'grown', [NOTHING, whole, shrunk])
  await site.write(image, `write -P 2 ${11 * OBJECT} ${OBJECT + 512}`)
  const written = await streams.checkedSnapshot(image, 'written', [whole, grown])
  await resize(image, 3 * OBJECT)
  await resize(image, 20 * OBJECT)
  await streams.checkedSnapshot(image, 'regrown', [NOTHING, shrunk, written])
  // the one in between is gone, as after a rolling window has moved on
  await site.ceph.client.removeSnapshots(image, 'shrunk', 'written')
  await resize(image, 16 * OBJECT)
  const last = await streams.checkedSnapshot(image, 'last', [whole, grown])
  const { diff } = await streams.exported(image, 'last', 'whole')
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
  const untouched = await streams.checkedSnapshot(clone, 'untouched')
  expect(untouched.bytes.equals(await site.bytes(`${parent}@base`))).toBe(true)
  await site.write(clone, 'write -P 3 4k 4k', `discard ${OBJECT} ${OBJECT}`, `write -z ${2 * OBJECT} 8k`)
  const touched = await streams.checkedSnapshot(clone, 'touched', [NOTHING, untouched])
  await resize(clone, 2 * OBJECT + 512)
  await resize(clone, 8 * OBJECT) // the parent's data does not come back
  const resized = await streams.checkedSnapshot(clone, 'resized', [untouched, touched])
  await ceph.run('rbd', 'flatten', '--no-progress', clone)
  await site.write(clone, `write -P 4 ${7 * OBJECT} 4k`)
  await streams.checkedSnapshot(clone, 'flat', [NOTHING, touched, resized])
})

test('an object map that is wrong misleads no increment', async () => {
  const { ceph } = site
  const image = await site.create(4 * MIB, ...SMALL_OBJECTS)
  await site.write(image, 'write -P 1 0 4M')
  const one = await streams.checkedSnapshot(image, 'one')
  const { id } = await site.cluster.image(image)
  await ceph.run('rados', '-p', 'vms', 'get', `rbd_object_map.${id}`, join(ceph.folder, 'map'))
  await site.write(image, 'write -P 2 1M 1M', 'discard 2M 1M')
  const two = await site.takeSnapshot(image, 'two')
  // as if nothing had been written between the two
  const hex = two.id.toString(16).padStart(16, '0')
  await ceph.run('rados', '-p', 'vms', 'put', `rbd_object_map.${id}.${hex}`, join(ceph.folder, 'map'))
  const truth = await site.bytes(`${image}@two`)
  const { bytes, diff } = await streams.exported(image, 'two', 'one')
  expect(applyDiff(diff, bytes, one.bytes).equals(truth)).toBe(true)
  // the map is looked at where whole objects are compared: so it is the wrong one that was put there
  const args = ['--conf', ceph.conf, 'export-diff', '--no-progress', '--whole-object', '--from-snap', 'one']
  const { stdout } = await execa('rbd', [...args, `${image}@two`, '-'], { encoding: 'buffer' })
  expect(stdout.length).toBeLessThan(100)
})

test('streams of random changes lead to what a striped image with its data in another pool holds', () => {
  const striping = ['--stripe-unit', '16K', '--stripe-count', '3', '--data-pool', 'data']
  return streams.checkRandomChanges([
    'a striped image with its data in another pool',
    [...SMALL_OBJECTS, ...striping],
  ])
})

test('a snapshot under writes of QEMU to an image with an exclusive lock has all that was flushed and nothing that came after', () =>
  streams.checkUnderWrites(['with an exclusive lock', []]))

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
