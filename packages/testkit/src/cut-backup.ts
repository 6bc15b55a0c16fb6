import { join } from 'node:path'
import { BackupPipeline, ImageHost, type StorageDriver } from '@varve/core'
import { createDenseQcow2 } from './dense-image.ts'
import type { NetworkProxy } from './network-proxy.ts'

const INSTANCE = 'web-1'

/** Options of {@link backUpAcrossCut}. */
export interface CutBackupOptions {
  /** Where the backup goes. */
  storage: StorageDriver
  /** What all of the storage's connections go through. */
  proxy: NetworkProxy
  /** An empty folder for the disk and the state. */
  folder: string
  /** The size of the disk in bytes, all of them data. */
  size: number
}

/** What {@link backUpAcrossCut} has made. */
export interface CutBackup {
  /** The disk's file, qcow2. */
  readonly disk: string
  /** The key of the stored image. */
  readonly key: string
  /** How many connections there were to cut. */
  readonly cut: number
}

/** Backs a disk up to a storage all of whose connections are cut, once, when half of it has been uploaded. */
export async function backUpAcrossCut(options: CutBackupOptions): Promise<CutBackup> {
  const { storage, proxy, folder, size } = options
  const disk = join(folder, 'vda.qcow2')
  await createDenseQcow2(disk, size)
  const host = new ImageHost({ instance: INSTANCE, disks: { vda: disk } })
  const backups = new BackupPipeline({ host, storage, stateDir: join(folder, 'state') })
  let cut = 0
  const { instance, chain, id } = await backups.run(
    { instance: INSTANCE },
    {
      onEvent(event) {
        if (cut > 0 || event.type !== 'progress' || event.bytesDone < size / 2) return
        cut = proxy.connections
        proxy.cutAll()
      },
    },
  )
  return { disk, key: `${instance.name}/${chain}/${id}/vda.qcow2`, cut }
}
