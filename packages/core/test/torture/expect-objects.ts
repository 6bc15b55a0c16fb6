import { basename } from 'node:path'
import { objectsOf } from '../../src/chain.ts'
import { ChainManager } from '../../src/chain-manager.ts'
import { type StorageDriver, TEMPORARY_PREFIX } from '../../src/storage.ts'
import { MANIFEST_FILE } from '../../src/storage-layout.ts'
import { filesIn } from './files-in.ts'

const DAY_MS = 24 * 60 * 60 * 1000

/**
 * Rejects where a storage holds anything but what its manifests name. The temporary file of an upload that was under way
 * when its process was killed is let be: nobody can tell it from one under way, so it stays until a `prune` a day
 * later, which is done here where the storage is a folder.
 *
 * @param folder where the storage is a folder: what is in it counts, and not what the driver shows of it
 */
export async function expectNoOtherObjects(
  storage: StorageDriver,
  folder: string | undefined,
): Promise<void> {
  const wanted = await objectsOfBackups(storage)
  const found = folder === undefined ? await keysOf(storage) : await filesIn(folder)
  expectSameNames(
    'the objects',
    found.filter(key => !basename(key).startsWith(TEMPORARY_PREFIX)),
    wanted,
  )
  if (folder === undefined) return
  await pruneLater(storage)
  expectSameNames('the files after a prune', await filesIn(folder), wanted)
}

/** Prunes no backup, but what is garbage a day from now. */
export async function pruneLater(storage: StorageDriver): Promise<void> {
  const { now } = Date
  Date.now = () => now() + DAY_MS + 60 * 60 * 1000
  try {
    await new ChainManager({ storage }).prune({ keepLast: 1000 })
  } finally {
    Date.now = now
  }
}

async function objectsOfBackups(storage: StorageDriver): Promise<string[]> {
  const { backups } = await new ChainManager({ storage }).list()
  return backups.flatMap(backup => [
    `${backup.folder}/${MANIFEST_FILE}`,
    ...objectsOf(backup).map(({ key }) => key),
  ])
}

async function keysOf(storage: StorageDriver): Promise<string[]> {
  const keys: string[] = []
  for await (const { key } of storage.list('')) keys.push(key)
  return keys
}

function expectSameNames(what: string, found: readonly string[], wanted: readonly string[]): void {
  const extra = found.filter(name => !wanted.includes(name))
  const lost = wanted.filter(name => !found.includes(name))
  if (extra.length + lost.length > 0)
    throw new Error(`${what}: ${extra.join(', ') || 'none'} too many, ${lost.join(', ') || 'none'} lost`)
}
