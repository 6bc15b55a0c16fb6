import { assertParent, assertPublished } from './assert-published.ts'
import { type BackupContext, stage } from './backup-context.ts'
import type { Frozen } from './backup-stages.ts'
import type { StoredBackup } from './backups.ts'
import { objectsOf } from './chain.ts'
import { blake3Hex } from './digest.ts'
import { VarveError } from './errors.ts'
import { fanOut } from './fan-out.ts'
import { isFileDisk } from './host.ts'
import {
  type BackupManifest,
  MANIFEST_VERSION,
  type ManifestDisk,
  type ManifestFile,
  serializeManifest,
} from './manifest.ts'
import { programVersion } from './program-version.ts'
import { putFile } from './put-file.ts'
import { bytesBody, type StorageDriver } from './storage.ts'
import { MANIFEST_FILE } from './storage-layout.ts'
import { VERSION } from './version.ts'

/**
 * Stores the instance's definition. It is the first object, and written before anything is done to the instance: a
 * storage that takes nothing is noticed in time.
 */
export async function storeDefinition(backup: BackupContext): Promise<ManifestFile | undefined> {
  const { journal, folder, instance } = backup
  await journal.record({ step: 'upload', folder })
  if (instance.definition === undefined) return undefined
  return putFile(backup, 'domain.xml', Buffer.from(instance.definition))
}

/** Stores the UEFI variables and writes down what the backup is. */
export async function describe(
  backup: BackupContext,
  frozen: Frozen,
  { definition, disks }: { definition: ManifestFile | undefined; disks: readonly ManifestDisk[] },
): Promise<BackupManifest> {
  const { id, instance, plan, run, startedAt } = backup
  const { name, uuid } = instance
  const readsFiles = plan.disks.some(({ disk }) => isFileDisk(disk))
  const image = plan.disks.map(({ disk }) => disk).find(disk => !isFileDisk(disk))
  return {
    version: MANIFEST_VERSION,
    id,
    chain: plan.parent?.manifest.chain ?? id,
    ...(plan.parent && { parent: plan.parent.manifest.id }),
    kind: plan.parent ? 'incremental' : 'full',
    instance: { name, ...(uuid !== undefined && { uuid }) },
    startedAt: startedAt.toISOString(),
    frozenAt: frozen.at.toISOString(),
    finishedAt: new Date().toISOString(),
    consistency: frozen.consistency,
    running: instance.running,
    disks,
    ...(definition && { definition }),
    ...(frozen.nvram && { nvram: await putFile(backup, 'nvram.fd', frozen.nvram) }),
    tools: {
      varve: VERSION,
      node: process.version,
      ...(readsFiles && { qemu: await programVersion('qemu-nbd', run) }),
      ...(image && { rbd: await image.cluster.version(run) }),
    },
  }
}

/**
 * Looks at what the backup consists of, as the storage has it, and again at what it rests on: during a long upload another
 * machine may have deleted or pruned it.
 *
 * @throws PARENT_MISSING, SIZE_MISMATCH
 */
async function assertPublishable(
  storage: StorageDriver,
  backup: StoredBackup,
  parent: StoredBackup | undefined,
  signal: AbortSignal,
): Promise<void> {
  if (parent) await assertParent(storage, parent.folder, signal)
  // One question for all; what it does not tell as it should be is asked for by itself.
  const listed = new Map<string, number>()
  for await (const { key, size } of storage.list(`${backup.folder}/`, { signal })) listed.set(key, size)
  const others = objectsOf(backup).filter(({ key, size }) => listed.get(key) !== size)
  await fanOut(others, { concurrency: OBJECTS_AT_ONCE, signal }, async ({ key, size }, signal) => {
    const stored = await storage.stat(key, { signal })
    if (stored?.size === size) return
    throw new VarveError(
      'SIZE_MISMATCH',
      `The storage holds ${stored ? `${stored.size} bytes` : 'nothing'} of ${key}, which was uploaded with ${size} bytes. Nothing was published; look for what removes objects there, then back up again.`,
      { context: { key, expected: size, actual: stored?.size }, retryable: true },
    )
  })
}

/** What a backup replaces once it is published, by disk. */
export interface Retired {
  readonly bitmaps: Readonly<Record<string, readonly string[]>>
  readonly snapshots: Readonly<Record<string, readonly string[]>>
}

/** How many objects the storage is asked for at a time. */
const OBJECTS_AT_ONCE = 4

/** Writes the manifest, last of all: from there on the backup exists. */
export async function publish(
  { folder, storage, plan, journal, run }: BackupContext,
  manifest: BackupManifest,
  retired: Retired,
): Promise<void> {
  const { signal = new AbortController().signal } = run
  stage(run, 'publish', 'Writing the manifest')
  await assertPublishable(storage, { manifest, folder }, plan.parent, signal)
  const key = `${folder}/${MANIFEST_FILE}`
  const bytes = serializeManifest(manifest)
  const publication = {
    manifest: key,
    size: bytes.byteLength,
    blake3: blake3Hex(bytes),
    ...(plan.parent && { parent: plan.parent.folder }),
    retire: retired.bitmaps,
    retireSnapshots: retired.snapshots,
  }
  await journal.record({ step: 'publish', ...publication })
  await storage.put(key, bytesBody(bytes), { signal })
  await assertPublished(storage, publication, signal)
  await journal.record({ step: 'published' })
}
