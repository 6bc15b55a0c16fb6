import { type BackupContext, stage } from './backup-context.ts'
import type { Frozen } from './backup-stages.ts'
import type { StoredBackup } from './backups.ts'
import { objectsOf } from './chain.ts'
import { runCommand } from './command.ts'
import { type ErrorCode, isVarveError, VarveError } from './errors.ts'
import { fanOut } from './fan-out.ts'
import { isFileDisk } from './host.ts'
import {
  type BackupManifest,
  MANIFEST_VERSION,
  type ManifestDisk,
  type ManifestFile,
  serializeManifest,
} from './manifest.ts'
import { putFile } from './put-file.ts'
import { isBeingDeleted } from './remove-backup.ts'
import type { RunOptions } from './run-options.ts'
import { bytesBody, type StorageDriver } from './storage.ts'
import { MANIFEST_FILE } from './storage-layout.ts'
import { uploadOf, verifyUploads } from './verify-upload.ts'
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
      ...(readsFiles && { qemu: await qemuVersion(run) }),
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
  run: RunOptions,
): Promise<void> {
  await assertParent(storage, parent, run)
  const { signal = new AbortController().signal } = run
  await fanOut(objectsOf(backup), { concurrency: OBJECTS_AT_ONCE, signal }, async ({ key, size }, signal) => {
    const stored = await storage.stat(key, { signal })
    if (stored?.size === size) return
    throw new VarveError(
      'SIZE_MISMATCH',
      `The storage holds ${stored ? `${stored.size} bytes` : 'nothing'} of ${key}, which was uploaded with ${size} bytes. Nothing was published; look for what removes objects there, then back up again.`,
      { context: { key, expected: size, actual: stored?.size }, retryable: true },
    )
  })
}

async function assertParent(
  storage: StorageDriver,
  parent: StoredBackup | undefined,
  run: RunOptions,
): Promise<void> {
  if (!parent) return
  const isThere = await storage.stat(`${parent.folder}/${MANIFEST_FILE}`, signalOf(run))
  const isGoing = await isBeingDeleted(storage, parent.folder, signalOf(run))
  if (isThere && !isGoing) return
  const { id } = parent.manifest
  throw new VarveError(
    'PARENT_MISSING',
    `The backup ${id} that this one rests on was deleted during the upload. Nothing was published; back up again.`,
    { context: { parent: id }, retryable: true },
  )
}

/** What a backup replaces once it is published, by disk. */
export interface Retired {
  readonly bitmaps: Readonly<Record<string, readonly string[]>>
  readonly snapshots: Readonly<Record<string, readonly string[]>>
}

/** How many objects the storage is asked for at a time. */
const OBJECTS_AT_ONCE = 4

/** What tells that a manifest which was written makes no backup. */
const NOT_PUBLISHED: ReadonlySet<ErrorCode> = new Set(['DIGEST_MISMATCH', 'SIZE_MISMATCH', 'PARENT_MISSING'])

/** Writes the manifest, last of all: from there on the backup exists. */
export async function publish(
  { folder, storage, plan, journal, run }: BackupContext,
  manifest: BackupManifest,
  retired: Retired,
): Promise<void> {
  stage(run, 'publish', 'Writing the manifest')
  await assertPublishable(storage, { manifest, folder }, plan.parent, run)
  const key = `${folder}/${MANIFEST_FILE}`
  await journal.record({
    step: 'publish',
    manifest: key,
    retire: retired.bitmaps,
    retireSnapshots: retired.snapshots,
  })
  const bytes = serializeManifest(manifest)
  await storage.put(key, bytesBody(bytes), signalOf(run))
  try {
    // It is small, and all else rests on it: it is read back whatever was asked for.
    const { signal = new AbortController().signal } = run
    await verifyUploads(storage, [uploadOf(key, bytes)], signal)
    await assertParent(storage, plan.parent, run) // see removeBackup
  } catch (error) {
    if (isVarveError(error) && NOT_PUBLISHED.has(error.code)) await storage.delete(key)
    throw error
  }
}

async function qemuVersion(run: RunOptions): Promise<string> {
  const { stdout } = await runCommand('qemu-nbd', ['--version'], run)
  return /\d+\.\d+\.\d+/.exec(stdout)?.[0] ?? 'unknown'
}

function signalOf({ signal }: RunOptions): { signal?: AbortSignal } {
  return signal ? { signal } : {}
}
