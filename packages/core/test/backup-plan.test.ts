import { expect, test } from 'vitest'
import {
  assertClustersFit,
  backupOfMark,
  bitmapsToRetire,
  chooseDisks,
  fallbackMessage,
  goneBackups,
  markName,
  type PlanInput,
  planBackup,
  snapshotObstacle,
  snapshotsToRetire,
} from '../src/backup-plan.ts'
import type { Catalog, StoredBackup } from '../src/backups.ts'
import { joinTwins, twinMark, twinOf } from '../src/bitmap-twin.ts'
import { objectsOf } from '../src/chain.ts'
import { VarveError } from '../src/errors.ts'
import type { DiskBitmap, FileDisk, HostDisk, Instance, RbdDisk } from '../src/host.ts'
import type { BackupManifest, FallbackReason, ManifestDisk, Qcow2ManifestDisk } from '../src/manifest.ts'
import { nextKind } from '../src/next-kind.ts'
import type { RbdCluster, RbdImage } from '../src/rbd.ts'

const GiB = 2 ** 30
const id = (n: number) => `20260101-00000${n}-000-00000${n}`

function bitmap(n: number, change: Partial<DiskBitmap> = {}): DiskBitmap {
  return {
    name: markName(id(n)),
    granularity: 65_536,
    enabled: true,
    inconsistent: false,
    twin: 'agrees',
    names: [markName(id(n))],
    ...change,
  }
}

function hostDisk(name: string, bitmaps: DiskBitmap[], change: Partial<FileDisk> = {}): FileDisk {
  return {
    name,
    path: `/img/${name}`,
    format: 'qcow2',
    blockDevice: false,
    virtualSize: GiB,
    bitmaps,
    holdsBitmaps: true,
    ...change,
  }
}

function manifestDisk(n: number, name: string, parent?: number): ManifestDisk {
  return {
    name,
    kind: parent === undefined ? 'full' : 'incremental',
    image: `${name}.qcow2`,
    blocks: `${name}.blake3`,
    format: 'qcow2',
    virtualSize: GiB,
    storedSize: 1000 + n,
    clusterSize: 65_536,
    digest: { root: '0'.repeat(64), blockSize: 4_194_304 },
    ...(parent !== undefined && { backing: `../${id(parent)}/${name}.qcow2` }),
    bitmap: { name: markName(id(n)), granularity: 65_536 },
    source: { path: `/img/${name}`, format: 'qcow2' },
  }
}

/** A backup `n` on `parent`, of the chain that backup `chain` began. */
function backup(n: number, chain: number, parent?: number, disks: string[] = ['vda']): StoredBackup {
  const manifest: BackupManifest = {
    version: 1,
    id: id(n),
    chain: id(chain),
    ...(parent !== undefined && { parent: id(parent) }),
    kind: parent === undefined ? 'full' : 'incremental',
    instance: { name: 'web-1' },
    startedAt: '2026-01-01T00:00:00.000Z',
    frozenAt: '2026-01-01T00:00:00.000Z',
    finishedAt: '2026-01-01T00:00:00.000Z',
    consistency: 'crash',
    running: true,
    disks: disks.map(name => manifestDisk(n, name, parent)),
    tools: {},
  }
  return { manifest, folder: `web-1/${id(chain)}/${id(n)}` }
}

function catalogOf(
  backups: readonly StoredBackup[],
  change: (sizes: Map<string, number>) => void = () => undefined,
): Catalog {
  const sizes = new Map<string, number>()
  for (const { key, size } of backups.flatMap(objectsOf)) sizes.set(key, size)
  change(sizes)
  return {
    backups: [...backups],
    damaged: [],
    objects: new Map([...sizes].map(([key, size]) => [key, { key, size }])),
  }
}

function plan(disks: HostDisk[], backups: StoredBackup[] | Catalog, change: Partial<PlanInput> = {}) {
  const catalog = Array.isArray(backups) ? catalogOf(backups) : backups
  const result = planBackup({ type: 'auto', disks, catalog, maxIncrementalChain: 14, ...change })
  return {
    parent: result.parent?.manifest.id,
    disks: result.disks.map(planned =>
      planned.kind === 'full' ? (planned.fallback ?? 'full') : planned.since,
    ),
  }
}

const chain = [backup(1, 1), backup(2, 1, 1)]

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

function rbdDisk(snapshots: [backup: number, snapshotId: number][], change: Partial<RbdImage> = {}): RbdDisk {
  const state = {
    id: 'abc',
    size: GiB,
    snapshots: snapshots.map(([n, id_]) => ({ name: markName(id(n)), id: id_ })),
    metadata: new Map<string, string>(),
    objectMapInvalid: false,
    ...change,
  }
  const cluster = {} as RbdCluster // a plan asks it for nothing
  return {
    name: 'vda',
    path: 'rbd:rbd/vda',
    format: 'rbd',
    image: 'rbd/vda',
    virtualSize: state.size,
    state,
    cluster,
  }
}

/** The same backup, of an RBD image whose snapshot had the number 10 times the backup's. */
function ofRbd(stored: StoredBackup, n: number): StoredBackup {
  const disks = stored.manifest.disks.map((disk): ManifestDisk => {
    const { name, kind, blocks, virtualSize, storedSize, digest, backing } = disk
    const fields = { name, kind, blocks, virtualSize, storedSize, digest }
    return {
      ...fields,
      image: `${name}.rbd-diff`,
      format: 'rbd-diff',
      index: { key: `${name}.index`, size: 7, blake3: digest.root },
      snapshot: { name: markName(id(n)), id: n * 10 },
      ...(backing !== undefined && { backing: backing.replace('.qcow2', '.rbd-diff') }),
      source: { path: 'rbd/vda', format: 'rbd', imageId: 'abc' },
    }
  })
  return { ...stored, manifest: { ...stored.manifest, disks } }
}

const rbdChain = [ofRbd(backup(1, 1), 1), ofRbd(backup(2, 1, 1), 2)]

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

const damaged = (n: number, of: number) => ({
  key: `web-1/${id(of)}/${id(n)}/manifest.json`,
  error: new VarveError('MANIFEST_INVALID', 'x'),
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

const reasons: Record<FallbackReason, true> = {
  'no-parent': true,
  'chain-limit': true,
  'parent-broken': true,
  'disk-new': true,
  'disk-replaced': true,
  'disk-shrunk': true,
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

function instance(disks: HostDisk[], unsupported: [string, string][] = []): Instance {
  return { name: 'web-1', running: true, disks, unsupported: new Map(unsupported) }
}

test('disks are chosen all, primary or by name', () => {
  const found = instance([hostDisk('vda', []), hostDisk('vdb', [])])
  const names = (selection: Parameters<typeof chooseDisks>[1]) =>
    chooseDisks(found, selection).map(disk => disk.name)
  expect(names('all')).toEqual(['vda', 'vdb'])
  expect(names('primary')).toEqual(['vda'])
  expect(names(['vdb', 'vdb'])).toEqual(['vdb'])
  const context = { instance: 'web-1', disks: ['vda', 'vdb'] }
  expect(() => names(['vdx'])).toThrow(
    expect.objectContaining({
      code: 'DISK_NOT_FOUND',
      message: 'web-1 has no disk vdx. It has vda, vdb.',
      context: { ...context, disk: 'vdx' },
    }),
  )
  expect(() => names([])).toThrow(
    expect.objectContaining({
      code: 'INVALID_ARGUMENT',
      message: expect.stringContaining('Name one'),
      context,
    }),
  )
})

test('a disk that cannot be backed up is never left out silently', () => {
  const found = instance([hostDisk('vda', [])], [['vdb', 'its type is network']])
  const refused = expect.objectContaining({
    code: 'DISK_UNSUPPORTED',
    message: expect.stringMatching(/^The disk vdb of web-1 .*: its type is network\. Name the disks/),
    context: { instance: 'web-1', disk: 'vdb' },
  })
  expect(() => chooseDisks(found, 'all')).toThrow(refused)
  expect(() => chooseDisks(found, ['vdb'])).toThrow(refused)
  expect(chooseDisks(found, ['vda'])).toHaveLength(1)
  const only = instance([], [['vdb', 'its type is network']])
  for (const selection of ['all', 'primary', ['vda']] as const)
    expect(() => chooseDisks(only, selection)).toThrow(refused)
})

test('an instance without a disk has none to back up', () => {
  for (const selection of ['all', 'primary', ['vda']] as const)
    expect(() => chooseDisks(instance([]), selection)).toThrow(
      expect.objectContaining({
        code: 'DISK_NOT_FOUND',
        message: 'web-1 has no disk to back up.',
        context: { instance: 'web-1', disks: [] },
      }),
    )
})

test('a cluster size that is too small for a disk is refused, with one that is enough', () => {
  const disk = (virtualSize: number) => [hostDisk('vda', []), hostDisk('vdb', [], { virtualSize })]
  assertClustersFit(disk(8192 * GiB), 4096)
  assertClustersFit([rbdDisk([], { size: 8192 * GiB + 512 })], 4096) // stored as a stream, which has no clusters
  for (const [size, enough] of [
    [8192 * GiB + 512, 8192],
    [16_384 * GiB, 8192],
    [32_768 * GiB, 8192],
    [65_536 * GiB, 16_384],
  ] as const) {
    const refused = {
      code: 'INVALID_ARGUMENT',
      message: expect.stringContaining(`a cluster size of ${enough} bytes`),
      context: { disk: 'vdb', virtualSize: size, clusterSize: 4096 },
    }
    expect(() => assertClustersFit(disk(size), 4096)).toThrow(expect.objectContaining(refused))
    assertClustersFit(disk(size), enough)
  }
})
