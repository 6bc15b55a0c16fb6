import { expect, test } from 'vitest'
import type { DamagedManifest, StoredBackup } from '../src/backups.ts'
import { dependentsOf, filesOf, indexChains, missingObjects, objectsOf, walkChain } from '../src/chain.ts'
import { VarveError } from '../src/errors.ts'
import type { ManifestDisk, ManifestFile } from '../src/manifest.ts'
import type { StoredObject } from '../src/storage.ts'

const id = (n: number) => `20260101-00000${n}-000-abcdef`
const folder = (n: number) => `web-1/${id(1)}/${id(n)}`
const file = (key: string, size: number): ManifestFile => ({ key, size, blake3: '0'.repeat(64) })

function fileDisk(name: string, parent?: number): ManifestDisk {
  return {
    name,
    kind: parent === undefined ? 'full' : 'incremental',
    image: `${name}.qcow2`,
    blocks: `${name}.blake3`,
    format: 'qcow2',
    virtualSize: 1024 ** 3,
    storedSize: 1000,
    clusterSize: 65_536,
    digest: { root: '0'.repeat(64), blockSize: 400 },
    ...(parent !== undefined && { backing: `../${id(parent)}/${name}.qcow2` }),
    source: { path: `/disks/${name}`, format: 'qcow2' },
  }
}

function rbdDisk(name: string): ManifestDisk {
  return {
    name,
    kind: 'full',
    image: `${name}.rbd-diff`,
    blocks: `${name}.blake3`,
    format: 'rbd-diff',
    virtualSize: 1024 ** 3,
    storedSize: 800,
    digest: { root: '0'.repeat(64), blockSize: 400 },
    index: file(`${name}.index`, 30),
    snapshot: { name: 'varve-x', id: 4 },
    source: { path: `rbd/${name}`, format: 'rbd', imageId: 'abc' },
  }
}

/** Backup `n` of one chain, on `parent`. */
function backup(n: number, parent?: number, disks = [fileDisk('vda', parent)]): StoredBackup {
  const time = '2026-01-01T00:00:00.000Z'
  return {
    folder: folder(n),
    manifest: {
      version: 1,
      id: id(n),
      chain: id(1),
      ...(parent !== undefined && { parent: id(parent) }),
      kind: parent === undefined ? 'full' : 'incremental',
      instance: { name: 'web-1' },
      startedAt: time,
      frozenAt: time,
      finishedAt: time,
      consistency: 'crash',
      running: true,
      disks,
      tools: {},
    },
  }
}

function index(backups: StoredBackup[], damaged: number[] = []) {
  const unusable = damaged.map(
    (n): DamagedManifest => ({
      key: `${folder(n)}/manifest.json`,
      error: new VarveError('MANIFEST_INVALID', 'No JSON at all.'),
    }),
  )
  return indexChains({ backups, damaged: unusable })
}

test('the objects of a backup are its images, their digests and every small file, with their sizes', () => {
  const stored = backup(1, undefined, [
    { ...fileDisk('vda'), map: file('vda.map', 20) } as ManifestDisk,
    fileDisk('vdb'),
    rbdDisk('vdc'),
  ])
  const manifest = { ...stored.manifest, definition: file('domain.xml', 7), nvram: file('nvram.fd', 9) }
  expect(filesOf(manifest).map(({ key }) => key)).toEqual(['domain.xml', 'nvram.fd', 'vda.map', 'vdc.index'])
  expect(objectsOf({ ...stored, manifest })).toEqual(
    [
      { key: 'vda.qcow2', size: 1000 },
      { key: 'vda.blake3', size: 3 * 32 }, // a digest for each block of 400 bytes that was begun
      { key: 'vdb.qcow2', size: 1000 },
      { key: 'vdb.blake3', size: 3 * 32 },
      { key: 'vdc.rbd-diff', size: 800 },
      { key: 'vdc.blake3', size: 2 * 32 },
      { key: 'domain.xml', size: 7 },
      { key: 'nvram.fd', size: 9 },
      { key: 'vda.map', size: 20 },
      { key: 'vdc.index', size: 30 },
    ].map(({ key, size }) => ({ key: `${folder(1)}/${key}`, size })),
  )
  expect(filesOf(backup(1).manifest)).toEqual([])
})

test('an object that is gone or of another size is told of, with what to do', () => {
  const stored = backup(1)
  const objects = new Map<string, StoredObject>(objectsOf(stored).map(object => [object.key, object]))
  expect(missingObjects(stored, objects)).toEqual([])
  const [image = '', digests = ''] = objects.keys()
  objects.delete(image)
  objects.set(digests, { key: digests, size: 5 })
  expect(missingObjects(stored, objects)).toEqual([
    expect.objectContaining({
      code: 'OBJECT_NOT_FOUND',
      message: expect.stringMatching(/vda\.qcow2 is gone\. .*copy of the storage/),
      context: { backup: id(1), key: image, expected: 1000, actual: undefined },
    }),
    expect.objectContaining({
      code: 'SIZE_MISMATCH',
      message: expect.stringMatching(/vda\.blake3 has 5 bytes instead of 96: .*copy of the storage/),
      context: { backup: id(1), key: digests, expected: 96, actual: 5 },
    }),
  ])
})

test('a chain with a link that is not there says which, where it would be, and keeps what is above', () => {
  const walk = walkChain(folder(3), index([backup(1), backup(3, 2)]))
  expect(walk.links.map(link => link.folder)).toEqual([folder(3)])
  expect(walk.problem).toMatchObject({
    code: 'CHAIN_BROKEN',
    context: { backup: id(3), link: id(2) },
    message: expect.stringMatching(
      `^The chain of backup ${id(3)} is broken: ${id(2)} is not on the storage.*${folder(2)}\\. Put it back`,
    ),
  })
})

test('a chain with a link that cannot be read says which, and why', () => {
  const { problem } = walkChain(folder(3), index([backup(1), backup(3, 2)], [2]))
  expect(problem).toMatchObject({
    code: 'CHAIN_BROKEN',
    message: `The chain of backup ${id(3)} is broken: the manifest of ${id(2)} cannot be used: No JSON at all.`,
    cause: { code: 'MANIFEST_INVALID' },
  })
  expect(walkChain(folder(2), index([], [2])).problem).toMatchObject({ code: 'MANIFEST_INVALID' })
})

test('each disk needs the image of the same disk in the parent', () => {
  const disks = (...names: string[]) => names.map(name => fileDisk(name, 1))
  const parent = backup(
    1,
    undefined,
    ['vda', 'vdb'].map(name => fileDisk(name)),
  )
  const walk = (child: StoredBackup) => walkChain(child.folder, index([parent, child]))
  expect(walk(backup(2, 1, disks('vdb', 'vda'))).problem).toBeUndefined()
  expect(walk(backup(2, 1, [fileDisk('vdc'), ...disks('vda')])).problem).toBeUndefined()
  expect(walk(backup(2, 1, disks('vda', 'vdc'))).problem).toMatchObject({
    code: 'CHAIN_BROKEN',
    context: { backup: id(2), link: id(1) },
    message: expect.stringContaining(
      `${id(1)} has no image ../${id(1)}/vdc.qcow2 that the disk vdc of ${id(2)} rests on. Use a backup`,
    ),
  })
  const swapped = disks('vda').map(disk => ({ ...disk, backing: `../${id(1)}/vdb.qcow2` }))
  expect(walk(backup(2, 1, swapped)).problem).toMatchObject({ code: 'CHAIN_BROKEN' })
})

test('what rests on a backup are its descendants and younger ones whose parent cannot be read, newest first', () => {
  const chains = index([backup(1), backup(3, 1), backup(4, 3), backup(6, 1)], [2, 5])
  expect(dependentsOf(folder(3), chains)).toEqual([id(5), id(4)])
  expect(dependentsOf(folder(1), chains)).toEqual([6, 5, 4, 3, 2].map(id))
  expect(dependentsOf(folder(6), chains)).toEqual([])
})
