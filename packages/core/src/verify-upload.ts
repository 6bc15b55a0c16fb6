import { digestObject } from './check-objects.ts'
import { BlockDigester } from './digest.ts'
import { VarveError } from './errors.ts'
import type { ObjectDigest } from './manifest.ts'
import type { StorageDriver } from './storage.ts'

/**
 * Checks what the storage holds after an upload: by its size, or by reading it back.
 *
 * @throws SIZE_MISMATCH, DIGEST_MISMATCH
 */
export async function verifyUpload(
  storage: StorageDriver,
  key: string,
  size: number,
  digest: ObjectDigest | undefined,
  mode: 'size' | 'digest',
  signal: AbortSignal,
): Promise<void> {
  const stored = await storage.stat(key, { signal })
  if (stored?.size !== size) {
    throw new VarveError(
      'SIZE_MISMATCH',
      `The storage holds ${stored ? `${stored.size} bytes` : 'nothing'} of ${key} after its upload; it should be ${size} bytes. Look at the storage before the next backup.`,
      {
        context: { key, expected: size, actual: stored?.size },
        retryable: true,
      },
    )
  }
  if (mode === 'size' || !digest) return
  const digester = new BlockDigester(digest.blockSize)
  await digestObject({ storage, signal, onBytes: () => undefined }, key, size, digester)
  const readBack = digester.finish().digest
  if (readBack.root !== digest.root) {
    throw new VarveError(
      'DIGEST_MISMATCH',
      `The storage gives back other bytes of ${key} than were uploaded. Look at the storage before the next backup.`,
      {
        context: { key, expected: digest.root, actual: readBack.root },
      },
    )
  }
}
