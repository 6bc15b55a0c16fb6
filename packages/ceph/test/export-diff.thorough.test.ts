import { afterAll, beforeAll, test } from 'vitest'
import { Exports, type ImageKind, SMALL_OBJECTS } from './exports.ts'
import { RbdSite } from './rbd-site.ts'

// Beside those of export-diff.lab.test.ts: the same of kinds of images that Ceph treats in another way, and Varve does not.

let site: RbdSite
let streams: Exports
beforeAll(async () => {
  site = await RbdSite.start()
  streams = new Exports(site)
})
afterAll(() => site[Symbol.asyncDispose]())

test.for<ImageKind>([['with an object map', []]])(
  'an increment of an image %s tells what was written, and trimmed and zeroed ranges as zeros',
  kind => streams.checkIncrement(kind),
)

test.for<ImageKind>([
  ['a plain image', SMALL_OBJECTS],
  [
    'a journaled image without an object map',
    [...SMALL_OBJECTS, '--image-feature', 'exclusive-lock', '--image-feature', 'journaling'],
  ],
])('streams of random changes lead to what %s holds', kind => streams.checkRandomChanges(kind))

test.for<ImageKind>([['without an exclusive lock', ['--image-feature', 'layering']]])(
  'a snapshot under writes of QEMU to an image %s has all that was flushed and nothing that came after',
  kind => streams.checkUnderWrites(kind),
)
