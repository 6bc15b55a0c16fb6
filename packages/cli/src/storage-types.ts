import { isAbsolute } from 'node:path'
import { z } from 'zod'
import { type StorageType, storageType } from './storage-type.ts'

const local = storageType(
  z.strictObject({
    path: z.string().refine(isAbsolute, 'must be an absolute path, such as /mnt/backup'),
    create: z.boolean().exactOptional(),
    requireMountPoint: z.boolean().exactOptional(),
    marker: z.string().exactOptional(),
  }),
  async options => new (await import('@varve/driver-local')).LocalDriver(options),
)

/** The kinds of storage that the configuration may name, by their `type`. */
export const STORAGE_TYPES: ReadonlyMap<string, StorageType> = new Map([['local', local]])
