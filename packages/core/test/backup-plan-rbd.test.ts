import { expect, test } from 'vitest'
import { markName, snapshotObstacle } from '../src/backup-plan.ts'
import {
  backup,
  bitmap,
  chain,
  GiB,
  hostDisk,
  id,
  manifestDisk,
  ofRbd,
  plan,
  rbdChain,
  rbdDisk,
} from './plan-fixtures.ts'

test('an RBD image gets an increment on the newest backup whose very snapshot it has', () => {
  const both = rbdDisk([
    [1, 10],
    [2, 20],
  ])
  expect(plan([both], rbdChain)).toEqual({ parent: id(2), disks: [markName(id(2))] })
  expect(plan([rbdDisk([[1, 10]])], rbdChain)).toEqual({ parent: id(1), disks: [markName(id(1))] })
})

test('an RBD image of another size, larger or smaller, gets an increment', () => {
  for (const size of [GiB / 2, 2 * GiB])
    expect(plan([rbdDisk([[2, 20]], { size })], rbdChain).parent).toBe(id(2))
})

test('an image that was restored says itself which snapshot holds the backup', () => {
  const metadata = new Map([[`varve.restored.${id(1)}.vda`, '77']])
  expect(plan([rbdDisk([[1, 77]], { id: 'new', metadata })], rbdChain).parent).toBe(id(1))
  expect(plan([rbdDisk([[1, 78]], { id: 'new', metadata })], rbdChain).disks).toEqual(['disk-replaced'])
})

test('a snapshot of a restored image with the number that the original had is not the one of the backup', () => {
  const metadata = new Map([[`varve.restored.${id(2)}.vda`, '77']])
  expect(plan([rbdDisk([[2, 20]], { id: 'new', metadata })], rbdChain).disks).toEqual(['snapshot-replaced'])
})

test('two images that were restored, and exchanged by a rename, are not taken for what they were', () => {
  const stored = ofRbd(backup(1, 1, undefined, ['vda', 'vdb']), 1)
  const restored = (disk: string, snapshot: number) => {
    const metadata = new Map([[`varve.restored.${id(1)}.${disk}`, String(snapshot)]])
    return rbdDisk([[1, snapshot]], { id: `new-${disk}`, metadata })
  }
  const [vda, vdb] = [restored('vda', 77), restored('vdb', 78)]
  const since = markName(id(1))
  expect(plan([vda, { ...vdb, name: 'vdb' }], [stored]).disks).toEqual([since, since])
  const exchanged = plan([vdb, { ...vda, name: 'vdb' }], [stored])
  expect(exchanged).toEqual({ parent: undefined, disks: ['disk-replaced', 'disk-replaced'] })
})

test('an RBD image has no snapshot of a backup of a file', () => {
  expect(snapshotObstacle(rbdDisk([[1, 10]]), manifestDisk(1, 'vda'), id(1))).toBe('disk-replaced')
})

test.each([
  ['snapshot-missing', rbdDisk([])],
  ['snapshot-replaced', rbdDisk([[2, 21]])],
  ['disk-replaced', rbdDisk([[2, 20]], { id: 'another' })],
] as const)('an RBD image falls back to a full image: %s', (reason, disk) => {
  expect(plan([disk], rbdChain)).toEqual({ parent: undefined, disks: [reason] })
})

test('a disk that moved between files and RBD is stored in full', () => {
  expect(plan([rbdDisk([[2, 20]])], chain).disks).toEqual(['disk-replaced'])
  expect(plan([hostDisk('vda', [bitmap(2)])], rbdChain).disks).toEqual(['disk-replaced'])
})
