import { expect, test } from 'vitest'
import { backupOfMark, fallbackMessage, markName, planBackup } from '../src/backup-plan.ts'
import { joinTwins, twinMark, twinOf } from '../src/bitmap-twin.ts'
import type { FallbackReason, Qcow2ManifestDisk } from '../src/manifest.ts'
import { nextKind } from '../src/next-kind.ts'
import {
  backup,
  bitmap,
  catalogOf,
  chain,
  damaged,
  GiB,
  hostDisk,
  id,
  manifestDisk,
  plan,
  rbdChain,
  rbdDisk,
} from './plan-fixtures.ts'

test('a mark is named after its backup, and no other name is a mark', () => {
  expect(markName(id(1))).toBe('varve-20260101-000001-000-000001')
  expect(backupOfMark('varve-20260101-000001-000-000001')).toBe(id(1))
  expect(backupOfMark(id(1))).toBeUndefined()
})

test('a disk that carries the bitmap of the newest backup gets an increment on it', () => {
  expect(plan([hostDisk('vda', [bitmap(2)])], chain)).toEqual({ parent: id(2), disks: [markName(id(2))] })
})

test('the chain goes on from the newest backup whose bitmap the disk carries, as after a restore of an older one', () => {
  expect(plan([hostDisk('vda', [bitmap(1)])], chain)).toEqual({ parent: id(1), disks: [markName(id(1))] })
})

test.each([
  ['bitmap-missing', {}, []],
  ['bitmap-missing', {}, [bitmap(7)]],
  ['bitmap-inconsistent', {}, [bitmap(2, { inconsistent: true })]],
  ['bitmap-disabled', {}, [bitmap(2, { enabled: false })]],
  ['bitmap-granularity', {}, [bitmap(2, { granularity: 4096 })]],
  ['bitmap-altered', {}, [bitmap(2, { twin: 'differs' })]],
  ['bitmap-altered', {}, [bitmap(2, { twin: 'missing' })]],
  ['bitmap-missing', {}, [bitmap(2, { twin: 'alone' })]],
  ['disk-replaced', {}, [bitmap(2, { twin: 'foreign' })]],
  ['disk-replaced', { path: '/img/snapshot-1' }, [bitmap(2)]],
  ['disk-shrunk', { virtualSize: GiB - 512 }, [bitmap(2)]],
  ['format-raw', { format: 'raw', holdsBitmaps: false }, []],
  ['format-qcow2-v2', { holdsBitmaps: false }, []],
  ['disk-readonly', { readOnly: true, holdsBitmaps: false }, []],
  ['disk-new', { name: 'vdb' }, [bitmap(2)]],
] as const)('a disk falls back to a full image: %s', (reason, change, bitmaps) => {
  expect(plan([hostDisk('vda', [...bitmaps], change)], chain)).toEqual({ parent: undefined, disks: [reason] })
})

test('a disk that has grown gets an increment', () => {
  expect(plan([hostDisk('vda', [bitmap(2)], { virtualSize: 2 * GiB })], chain).parent).toBe(id(2))
})

test('each disk falls back by itself', () => {
  const both = [backup(1, 1, undefined, ['vda', 'vdb'])]
  expect(plan([hostDisk('vda', []), hostDisk('vdb', [bitmap(1)]), hostDisk('vdc', [])], both)).toEqual({
    parent: id(1),
    disks: ['bitmap-missing', markName(id(1)), 'disk-new'],
  })
})

test('each disk rests on the image of its own, of the size that it had', () => {
  const disks = [manifestDisk(1, 'vda'), { ...manifestDisk(1, 'vdb'), virtualSize: GiB / 2 }]
  const stored = backup(1, 1)
  const both = { ...stored, manifest: { ...stored.manifest, disks } }
  const [vda, vdb] = [hostDisk('vda', [bitmap(1)]), hostDisk('vdb', [bitmap(1)])]
  const since = markName(id(1))
  expect(
    planBackup({ type: 'auto', disks: [vda, vdb], catalog: catalogOf([both]), maxIncrementalChain: 14 }),
  ).toEqual({
    parent: both,
    disks: [
      { disk: vda, kind: 'incremental', since, parentSize: GiB, backing: `../${id(1)}/vda.qcow2` },
      { disk: vdb, kind: 'incremental', since, parentSize: GiB / 2, backing: `../${id(1)}/vdb.qcow2` },
    ],
  })
})

test('one disk that carries the bitmap of an older backup is enough for a chain to go on from it', () => {
  const names = ['vda', 'vdb']
  const both = [backup(1, 1, undefined, names), backup(2, 1, 1, names)]
  expect(plan([hostDisk('vda', []), hostDisk('vdb', [bitmap(1)])], both)).toEqual({
    parent: id(1),
    disks: ['bitmap-missing', markName(id(1))],
  })
})

test('a full backup is one without a fallback, and a first one says that there is no parent', () => {
  expect(plan([hostDisk('vda', [bitmap(2)])], chain, { type: 'full' })).toEqual({
    parent: undefined,
    disks: ['full'],
  })
  expect(plan([hostDisk('vda', [])], [])).toEqual({ parent: undefined, disks: ['no-parent'] })
})

test('two block devices whose names were exchanged, as at a boot, are not taken for what they were', () => {
  const stored = [backup(1, 1, undefined, ['vda', 'vdb'])]
  const mark = (disk: string) => twinMark(disk, 'device ')
  const since = markName(id(1))
  /** A disk on a device that has the bitmaps which `of` was given. */
  const disk = (name: string, of: string) => {
    const { twin: _, names: __, ...found } = bitmap(1)
    const bitmaps = joinTwins(
      [found, { ...found, name: twinOf(since, mark(of)) }].map(each => ({ ...each, dirty: 7 })),
      mark(name),
    )
    return hostDisk(name, bitmaps, { blockDevice: true })
  }
  expect(plan([disk('vda', 'vda'), disk('vdb', 'vdb')], stored).disks).toEqual([since, since])
  const exchanged = plan([disk('vda', 'vdb'), disk('vdb', 'vda')], stored)
  expect(exchanged).toEqual({ parent: undefined, disks: ['disk-replaced', 'disk-replaced'] })
})

test('an increment with no backup at all is an error', () => {
  expect(() => plan([hostDisk('vda', [])], [], { type: 'incremental' })).toThrow(
    expect.objectContaining({
      code: 'PARENT_MISSING',
      message: expect.stringMatching(/no backup of this instance .* full backup first/),
    }),
  )
})

test('a chain that has its length is followed by a full backup', () => {
  const disks = [hostDisk('vda', [bitmap(2)])]
  expect(plan(disks, chain, { maxIncrementalChain: 2 }).parent).toBe(id(2))
  expect(plan(disks, chain, { maxIncrementalChain: 1 }).disks).toEqual(['chain-limit'])
  expect(plan([hostDisk('vda', [bitmap(1)])], chain, { maxIncrementalChain: 0 }).disks).toEqual([
    'chain-limit',
  ])
})

test('a parent that is not whole on the storage, itself or further up, is not built on', () => {
  const disks = [hostDisk('vda', [bitmap(2)])]
  for (const { folder } of chain) {
    const breaks: ((sizes: Map<string, number>) => void)[] = [
      sizes => sizes.delete(`${folder}/vda.qcow2`),
      sizes => sizes.set(`${folder}/vda.qcow2`, 7),
      sizes => sizes.delete(`${folder}/vda.blake3`),
    ]
    for (const change of breaks)
      expect(plan(disks, catalogOf(chain, change)).disks).toEqual(['parent-broken'])
  }
  expect(plan(disks, [backup(2, 1, 1)]).disks).toEqual(['parent-broken'])
})

test('an increment where all that is there is damaged becomes a full backup', () => {
  const catalog = { ...catalogOf([]), damaged: [damaged(1, 1)] }
  expect(plan([hostDisk('vda', [])], catalog, { type: 'incremental' }).disks).toEqual(['parent-broken'])
})

test('a mark that went to a backup whose manifest is damaged is not missing', () => {
  const fileCatalog = { ...catalogOf(chain), damaged: [damaged(3, 1)] }
  expect(plan([hostDisk('vda', [bitmap(3)])], fileCatalog).disks).toEqual(['parent-broken'])
  const rbdCatalog = { ...catalogOf(rbdChain), damaged: [damaged(3, 1)] }
  expect(plan([rbdDisk([[3, 30]])], rbdCatalog).disks).toEqual(['parent-broken'])
})

test('a damaged backup whose mark a disk carries changes nothing else', () => {
  const catalog = { ...catalogOf(chain), damaged: [damaged(3, 1)] }
  expect(plan([hostDisk('vda', [bitmap(2), bitmap(3)])], catalog).parent).toBe(id(2))
  expect(plan([hostDisk('vda', [bitmap(2, { enabled: false }), bitmap(3)])], catalog).disks).toEqual([
    'bitmap-disabled',
  ])
})

const rawDisk = () => {
  const stored = backup(1, 1)
  const [disk] = stored.manifest.disks
  const { bitmap: _, ...raw } = { ...disk, source: { path: '/img/vda', format: 'raw' } } as Qcow2ManifestDisk
  return { ...stored, manifest: { ...stored.manifest, disks: [raw] } }
}

// The chain manager sees the storage only, so it takes the disk for one that carries the newest backup's bitmap.
test.each([
  ['no backup', catalogOf([]), []],
  ['a chain', catalogOf(chain), [bitmap(2)]],
  ['a chain at its limit', catalogOf([...chain, backup(3, 1, 2), backup(4, 1, 3)]), [bitmap(4)]],
  ['a broken chain', catalogOf([backup(2, 1, 1)]), [bitmap(2)]],
  ['a lost image', catalogOf(chain, sizes => sizes.delete(`${chain[0]?.folder}/vda.qcow2`)), [bitmap(2)]],
  ['a damaged newest manifest', { ...catalogOf(chain), damaged: [damaged(3, 1)] }, [bitmap(3)]],
  ['a damaged older manifest', { ...catalogOf([backup(2, 2)]), damaged: [damaged(1, 1)] }, [bitmap(2)]],
  ['a damaged manifest and no other', { ...catalogOf([]), damaged: [damaged(1, 1)] }, [bitmap(1)]],
  ['a raw disk', catalogOf([rawDisk()]), undefined],
])('the chain manager foresees what the plan of the next backup is: %s', (_, catalog, bitmaps) => {
  const disk = hostDisk('vda', bitmaps ?? [], bitmaps ? {} : { format: 'raw', holdsBitmaps: false })
  const planned = planBackup({ type: 'auto', disks: [disk], catalog, maxIncrementalChain: 3 })
  const [first] = planned.disks
  expect(nextKind(catalog, { maxIncrementalChain: 3 })).toEqual(
    first?.kind === 'incremental'
      ? { kind: 'incremental', parent: planned.parent }
      : { kind: 'full', reason: first?.fallback },
  )
})

const reasons: Record<FallbackReason, true> = {
  'no-parent': true,
  'chain-limit': true,
  'parent-broken': true,
  'disk-new': true,
  'disk-replaced': true,
  'disk-shrunk': true,
  'disk-readonly': true,
  'format-raw': true,
  'format-qcow2-v2': true,
  'bitmap-missing': true,
  'bitmap-inconsistent': true,
  'bitmap-disabled': true,
  'bitmap-altered': true,
  'bitmap-granularity': true,
  'snapshot-missing': true,
  'snapshot-replaced': true,
}

test('each fallback has a sentence of its own, which names the disk', () => {
  const told = (Object.keys(reasons) as FallbackReason[]).map(reason => fallbackMessage('vda', reason))
  for (const sentence of told) expect(sentence).toMatch(/^[A-Z].+ full backup \(disk vda\)\.$/)
  expect(new Set(told).size).toBe(told.length)
})
