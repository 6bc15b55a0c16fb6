import { expect, test } from 'vitest'
import { bitmapsToRetire, goneBackups, markName, snapshotsToRetire } from '../src/backup-plan.ts'
import { backup, bitmap, catalogOf, chain, hostDisk, id, ofRbd, rbdChain, rbdDisk } from './plan-fixtures.ts'

test('the newest snapshots stay, as many as asked for, the new one among them', () => {
  const backups = [...rbdChain, ofRbd(backup(3, 1, 2), 3)]
  const disks = [
    rbdDisk([
      [1, 10],
      [2, 20],
      [3, 30],
      [4, 40],
      [9, 90],
    ]),
    hostDisk('vdb', [bitmap(1)]),
  ]
  const retired = (keep: number) => snapshotsToRetire(disks, backups, id(4), keep)
  expect(retired(1)).toEqual({ vda: [1, 2, 3].map(n => markName(id(n))) })
  expect(retired(2)).toEqual({ vda: [1, 2].map(n => markName(id(n))) })
  expect(retired(7)).toEqual({ vda: [] })
})

test('the oldest snapshots go first, in whatever order the image lists them', () => {
  const disk = rbdDisk([
    [3, 30],
    [1, 10],
    [2, 20],
  ])
  const backups = [...rbdChain, ofRbd(backup(3, 1, 2), 3)]
  expect(snapshotsToRetire([disk], backups, id(3), 2)).toEqual({ vda: [markName(id(1))] })
  expect(snapshotsToRetire([disk], backups, id(4), 2)).toEqual({ vda: [1, 2].map(n => markName(id(n))) })
})

test('only bitmaps of backups on this storage are retired, and never the new one', () => {
  const disks = [
    hostDisk('vda', [bitmap(1), bitmap(2), bitmap(3), bitmap(9), { ...bitmap(1), name: 'other' }]),
  ]
  const retired = { vda: [markName(id(1)), markName(id(2))] }
  expect(bitmapsToRetire(disks, chain, id(3))).toEqual(retired)
  expect(bitmapsToRetire(disks, [...chain, backup(3, 1, 2)], id(3))).toEqual(retired)
})

test('an RBD image has no bitmaps to retire, and a file no snapshots', () => {
  const disks = [rbdDisk([[1, 10]]), hostDisk('vdb', [bitmap(1)])]
  expect(bitmapsToRetire(disks, chain, id(3))).toEqual({ vdb: [markName(id(1))] })
  expect(snapshotsToRetire(disks, rbdChain, id(3), 1)).toEqual({ vda: [markName(id(1))] })
})

test('the marks of backups that are gone are retired too', () => {
  const catalog = catalogOf(chain)
  const gone = goneBackups([1, 2, 3, 4].map(id), catalog)
  expect(gone).toEqual(new Set([id(3), id(4)]))
  const disks = [
    hostDisk('vdb', [bitmap(3), bitmap(5), { ...bitmap(3), name: 'other' }]),
    rbdDisk([
      [2, 20],
      [3, 30],
    ]),
  ]
  expect(bitmapsToRetire(disks, chain, id(5), gone)).toEqual({ vdb: [markName(id(3))] })
  expect(snapshotsToRetire(disks, rbdChain, id(5), 2, gone)).toEqual({ vda: [markName(id(3))] })
})

test('a backup is not gone while the storage has anything of it, and none is from a storage without backups', () => {
  const left = { key: `web-1/${id(1)}/${id(3)}/vda.qcow2`, size: 1 }
  const elsewhere = { key: 'web-1/notes.txt', size: 1 }
  const catalog = catalogOf(chain)
  const objects = new Map([...catalog.objects, [left.key, left], [elsewhere.key, elsewhere]])
  expect(goneBackups([3, 4].map(id), { ...catalog, objects })).toEqual(new Set([id(4)]))
  expect(goneBackups([1, 2].map(id), catalogOf([]))).toEqual(new Set())
})
