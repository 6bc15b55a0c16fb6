import { randomBytes } from 'node:crypto'
import { backupTime } from '../src/backup-id.ts'
import { BlockDigester, blake3Hex } from '../src/digest.ts'
import { type BackupManifest, serializeManifest } from '../src/manifest.ts'
import { bytesBody, type StorageDriver } from '../src/storage.ts'
import { backupFolder } from '../src/storage-layout.ts'

/** A backup as a test of chains wants it: a few bytes in place of an image. */
export interface FakeBackup {
  id: string
  /** When it began. Default: as its id tells. */
  startedAt?: Date
  /** Absent in a full one. */
  parent?: string | undefined
  /** Default: the id. */
  chain?: string | undefined
  /** Default: `web-1`. */
  instance?: string
  /** The instance's UUID. Default: none, as of plain images. */
  uuid?: string
  /** Names of the disks, all of the backup's kind. Default: `vda`. */
  disks?: readonly string[]
  /** Names of disks that are full, whatever the backup is. */
  fullDisks?: readonly string[]
}

/** Stores a backup whose every size and digest is right; returns its folder and manifest. */
export async function storeFake(
  storage: StorageDriver,
  fake: FakeBackup,
): Promise<{ folder: string; manifest: BackupManifest }> {
  const { id, parent, chain = id, instance = 'web-1', disks = ['vda'], fullDisks = [] } = fake
  const folder = backupFolder(instance, chain, id)
  const time = (fake.startedAt ?? backupTime(id)).toISOString()
  const bytes = new Map<string, Uint8Array>([['domain.xml', Buffer.from(`<domain id="${id}"/>`)]])

  const manifest: BackupManifest = {
    version: 1,
    id,
    chain,
    ...(parent !== undefined && { parent }),
    kind: parent === undefined ? 'full' : 'incremental',
    instance: { name: instance, ...(fake.uuid !== undefined && { uuid: fake.uuid }) },
    startedAt: time,
    frozenAt: time,
    finishedAt: time,
    consistency: 'crash',
    running: true,
    disks: [...disks, ...fullDisks].map(name => {
      const incremental = parent !== undefined && !fullDisks.includes(name)
      const image = randomBytes(100)
      const digester = new BlockDigester()
      digester.update(image)
      const { digest, blocks } = digester.finish()
      bytes.set(`${name}.qcow2`, image)
      bytes.set(`${name}.blake3`, blocks)
      return {
        name,
        kind: incremental ? 'incremental' : 'full',
        image: `${name}.qcow2`,
        blocks: `${name}.blake3`,
        format: 'qcow2',
        virtualSize: 1024 ** 3,
        storedSize: image.byteLength,
        clusterSize: 65_536,
        digest,
        ...(incremental && { backing: `../${parent}/${name}.qcow2` }),
        bitmap: { name: `varve-${id}`, granularity: 65_536 },
        source: { path: `/disks/${name}.qcow2`, format: 'qcow2' },
      }
    }),
    definition: {
      key: 'domain.xml',
      size: bytes.get('domain.xml')?.byteLength ?? 0,
      blake3: blake3Hex(bytes.get('domain.xml') ?? new Uint8Array()),
    },
    tools: {},
  }
  bytes.set('manifest.json', serializeManifest(manifest))
  for (const [name, content] of bytes) await storage.put(`${folder}/${name}`, bytesBody(content))
  return { folder, manifest }
}

/** The id of a backup of a day of 2026, numbered from 1 on. */
export function dayId(day: number): string {
  const date = new Date(Date.UTC(2026, 0, day)).toISOString().slice(0, 10).replaceAll('-', '')
  return `${date}-120000-000-abcdef`
}

/** Stores a full backup of the first day and an increment of each later one; returns their folders. */
export async function storeFakeChain(
  storage: StorageDriver,
  days: readonly number[],
  fake: Partial<FakeBackup> = {},
): Promise<string[]> {
  const folders: string[] = []
  let parent: string | undefined
  for (const day of days) {
    const { folder } = await storeFake(storage, {
      ...fake,
      id: dayId(day),
      parent,
      chain: dayId(days[0] ?? day),
    })
    folders.push(folder)
    parent = dayId(day)
  }
  return folders
}
