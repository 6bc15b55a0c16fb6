import { mkdir, readdir, readFile, rename, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { z } from 'zod'
import { isBackupId } from './backup-id.ts'
import type { StorageReference } from './journal.ts'
import { instanceFolder } from './storage-layout.ts'

const storageReference = z.object({ type: z.string(), location: z.string() })

/**
 * To which storage each backup of an instance went whose mark, a bitmap or a snapshot, may be on its disks. The mark
 * itself does not tell, and a backup that is not on one storage may well be on another. Kept in
 * `<stateDir>/marks/<instance>/<id>.json`; where that is lost, marks stay on the disks and nothing else is lost.
 */
export class MarkLedger {
  readonly #folder: string

  constructor(stateDir: string, instance: string) {
    this.#folder = join(stateDir, 'marks', instanceFolder(instance))
  }

  /** To be called before the mark is made. */
  async add(backup: string, { type, location }: StorageReference): Promise<void> {
    await mkdir(this.#folder, { recursive: true, mode: 0o700 })
    const temporary = `${this.#path(backup)}.tmp`
    await writeFile(temporary, JSON.stringify({ type, location }), { mode: 0o600, flush: true })
    await rename(temporary, this.#path(backup))
  }

  /** The backups that went to a storage. */
  async backupsOn({ type, location }: StorageReference): Promise<string[]> {
    const names = await readdir(this.#folder).catch(error => {
      if (error instanceof Error && 'code' in error && error.code === 'ENOENT') return []
      throw error
    })
    const found: string[] = []
    for (const name of names) {
      const backup = name.slice(0, -'.json'.length)
      if (!name.endsWith('.json') || !isBackupId(backup)) continue
      const storage = await this.#read(backup)
      if (storage?.type === type && storage.location === location) found.push(backup)
    }
    return found
  }

  /** No disk has the mark any more. */
  async remove(backup: string): Promise<void> {
    await rm(this.#path(backup), { force: true })
  }

  async #read(backup: string): Promise<StorageReference | undefined> {
    const text = await readFile(this.#path(backup), 'utf8').catch(error => {
      if (error instanceof Error && 'code' in error && error.code === 'ENOENT') return undefined // removed since
      throw error
    })
    try {
      return text === undefined ? undefined : storageReference.parse(JSON.parse(text))
    } catch {
      return undefined // what cannot be read tells nothing, and the mark stays
    }
  }

  #path(backup: string): string {
    return join(this.#folder, `${backup}.json`)
  }
}
