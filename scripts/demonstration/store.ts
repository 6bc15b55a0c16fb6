import { mkdir } from 'node:fs/promises'
import { join } from 'node:path'
import type { StorageDriver } from '@varve/core'
import { LocalDriver } from '@varve/driver-local'

/** Where the demonstration keeps its backups. */
export interface Store extends AsyncDisposable {
  /** What it is, for the screen. */
  readonly title: string
  readonly driver: StorageDriver
  /** A folder with what is stored, as the server itself holds or gives it: no part of Varve reads it. */
  files(): Promise<string>
}

/** Opens a store that keeps what it needs below `folder`. */
type OpenStore = (folder: string) => Promise<Store>

async function localStore(folder: string): Promise<Store> {
  const path = join(folder, 'storage')
  await mkdir(path)
  const driver = new LocalDriver({ path })
  return {
    title: 'a local folder',
    driver,
    files: async () => path,
    [Symbol.asyncDispose]: () => driver[Symbol.asyncDispose](),
  }
}

/** The stores that `--storage` chooses from. */
export const STORES: ReadonlyMap<string, OpenStore> = new Map([['local', localStore]])
