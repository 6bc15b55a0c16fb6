import type { BackupContext } from './backup-context.ts'
import { blake3Hex } from './digest.ts'
import type { ManifestFile } from './manifest.ts'
import { bytesBody } from './storage.ts'
import { uploadOf, verifyUploads } from './verify-upload.ts'

/** Stores one of the small files of a backup, and reads it back where that is asked for. */
export async function putFile(
  { storage, folder, request, run }: BackupContext,
  key: string,
  bytes: Uint8Array,
): Promise<ManifestFile> {
  const { signal = new AbortController().signal } = run
  const upload = uploadOf(`${folder}/${key}`, bytes)
  await storage.put(upload.key, bytesBody(bytes), { signal })
  if (request.verifyUpload === 'digest') await verifyUploads(storage, [upload], signal)
  return { key, size: bytes.byteLength, blake3: blake3Hex(bytes) }
}
