import { digestObject } from './check-objects.ts'
import { BlockDigester } from './digest.ts'
import { VarveError } from './errors.ts'
import type { ObjectDigest } from './manifest.ts'
import type { StorageDriver } from './storage.ts'

/** An object that was uploaded, and the digest of what was. */
export interface Upload {
  readonly key: string
  readonly size: number
  readonly digest: ObjectDigest
}

/** What is uploaded from memory. */
export function uploadOf(key: string, bytes: Uint8Array): Upload {
  const digester = new BlockDigester()
  digester.update(bytes)
  const { size, digest } = digester.finish()
  return { key, size, digest }
}

/**
 * Reads back what was uploaded.
 *
 * @throws SIZE_MISMATCH, DIGEST_MISMATCH
 */
export async function verifyUploads(
  storage: StorageDriver,
  uploads: readonly Upload[],
  signal: AbortSignal,
): Promise<void> {
  for (const upload of uploads) {
    await verifySize(storage, upload, signal)
    await verifyDigest(storage, upload, signal)
  }
}

/** Looks for an object that was uploaded, and at its size. @throws SIZE_MISMATCH also where there is none */
export async function verifySize(
  storage: StorageDriver,
  { key, size }: Pick<Upload, 'key' | 'size'>,
  signal: AbortSignal,
): Promise<void> {
  const stored = await storage.stat(key, { signal })
  if (stored?.size === size) return
  throw new VarveError(
    'SIZE_MISMATCH',
    `The storage holds ${stored ? `${stored.size} bytes` : 'nothing'} of ${key} after its upload; it should be ${size} bytes. Look at the storage before the next backup.`,
    {
      context: { key, expected: size, actual: stored?.size },
      retryable: true,
    },
  )
}

async function verifyDigest(
  storage: StorageDriver,
  { key, size, digest }: Upload,
  signal: AbortSignal,
): Promise<void> {
  const digester = new BlockDigester(digest.blockSize)
  await digestObject({ storage, signal, onBytes: () => undefined }, key, size, digester)
  const readBack = digester.finish().digest
  if (readBack.root === digest.root) return
  throw new VarveError(
    'DIGEST_MISMATCH',
    `The storage gives back other bytes of ${key} than were uploaded. Look at the storage before the next backup.`,
    {
      context: { key, expected: digest.root, actual: readBack.root },
    },
  )
}
