import { mkdir } from 'node:fs/promises'
import { join } from 'node:path'
import { LocalDriver } from '@varve/driver-local'
import { createQcow2, qemuIo, sha256Content } from '@varve/testkit/lab'
import { BackupPipeline } from '../src/backup-pipeline.ts'
import { ImageHost } from '../src/image-host.ts'
import type { BackupManifest } from '../src/manifest.ts'

/** A backup of an image, to be restored in many ways. */
export interface StoredImage {
  readonly storage: LocalDriver
  readonly stateDir: string
  readonly manifest: BackupManifest
  /** The SHA-256 of what the disk held. */
  readonly wanted: string
}

/** Backs up an image of that many bytes, at least 4 MiB, of which the second to the fourth MiB hold data. */
export async function storeImage(folder: string, size: number): Promise<StoredImage> {
  const stateDir = join(folder, 'state')
  await mkdir(join(folder, 'storage'))
  const storage = new LocalDriver({ path: join(folder, 'storage') })
  const disk = join(folder, 'disk.qcow2')
  await createQcow2(disk, size)
  await qemuIo(disk, 'qcow2', ['write -P 0x11 1M 3M'])
  const wanted = await sha256Content(disk, 'qcow2')
  const host = new ImageHost({ instance: 'web-1', disks: { vda: disk } })
  const manifest = await new BackupPipeline({ host, storage, stateDir }).run({ instance: 'web-1' })
  return { storage, stateDir, manifest, wanted }
}
