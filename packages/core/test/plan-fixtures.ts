import { markName, type PlanInput, planBackup } from '../src/backup-plan.ts'
import type { Catalog, StoredBackup } from '../src/backups.ts'
import { objectsOf } from '../src/chain.ts'
import { VarveError } from '../src/errors.ts'
import type { DiskBitmap, FileDisk, HostDisk, RbdDisk } from '../src/host.ts'
import type { BackupManifest, ManifestDisk } from '../src/manifest.ts'
import type { RbdCluster, RbdImage } from '../src/rbd.ts'

export const GiB = 2 ** 30
export const id = (n: number) => `20260101-00000${n}-000-00000${n}`

export function bitmap(n: number, change: Partial<DiskBitmap> = {}): DiskBitmap {
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

export function hostDisk(name: string, bitmaps: DiskBitmap[], change: Partial<FileDisk> = {}): FileDisk {
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

export function manifestDisk(n: number, name: string, parent?: number): ManifestDisk {
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
export function backup(n: number, chain: number, parent?: number, disks: string[] = ['vda']): StoredBackup {
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

export function catalogOf(
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

export function plan(disks: HostDisk[], backups: StoredBackup[] | Catalog, change: Partial<PlanInput> = {}) {
  const catalog = Array.isArray(backups) ? catalogOf(backups) : backups
  const result = planBackup({ type: 'auto', disks, catalog, maxIncrementalChain: 14, ...change })
  return {
    parent: result.parent?.manifest.id,
    disks: result.disks.map(planned =>
      planned.kind === 'full' ? (planned.fallback ?? 'full') : planned.since,
    ),
  }
}

export const chain = [backup(1, 1), backup(2, 1, 1)]

export function rbdDisk(
  snapshots: [backup: number, snapshotId: number][],
  change: Partial<RbdImage> = {},
): RbdDisk {
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
export function ofRbd(stored: StoredBackup, n: number): StoredBackup {
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

export const rbdChain = [ofRbd(backup(1, 1), 1), ofRbd(backup(2, 1, 1), 2)]

export const damaged = (n: number, of: number) => ({
  key: `web-1/${id(of)}/${id(n)}/manifest.json`,
  error: new VarveError('MANIFEST_INVALID', 'x'),
})
