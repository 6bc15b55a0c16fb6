import { randomBytes } from 'node:crypto'
import { rename, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { z } from 'zod'
import { isBackupId } from './backup-id.ts'
import type { StorageReference } from './journal.ts'
import { makeFolders } from './make-folders.ts'
import { isSameStorage } from './same-storage.ts'
import { statIfThere } from './stat-if-there.ts'
import { inStateFolder, namesIn, textOf } from './state-folder.ts'
import { instanceFolder, instanceOfFolder } from './storage-layout.ts'

const TEMPORARY = '.json.tmp'
/** A file that takes milliseconds to write, and has not got its name after so many, was left by a process that died. */
const LEFT_AFTER_MS = 60 * 60 * 1000

const storageReference = z.object({ type: z.string(), location: z.string() })

/**
 * To which storage each backup of an instance went whose mark, a bitmap or a snapshot, may be on its disks. The mark
 * itself does not tell, and a backup that is not on one storage may well be on another. Kept in
 * `<stateDir>/marks/<instance>/<id>.json`; where that is lost, marks stay on the disks and nothing else is lost. Every
 * method may throw STATE_DIR_FAILED.
 */
export class MarkLedger {
  readonly #folder: string

  constructor(stateDir: string, instance: string) {
    this.#folder = join(stateDir, 'marks', instanceFolder(instance))
  }

  /** The instances that a state folder has a ledger of. */
  static async instances(stateDir: string): Promise<string[]> {
    const folders = await namesIn(join(stateDir, 'marks'))
    return folders.map(instanceOfFolder).filter(instance => instance !== undefined)
  }

  /** To be called before the mark is made. */
  async add(backup: string, { type, location }: StorageReference): Promise<void> {
    const path = this.#path(backup)
    // Of its own name: another restore of the same backup may be at it.
    const temporary = join(this.#folder, `${backup}.${randomBytes(8).toString('hex')}${TEMPORARY}`)
    await inStateFolder(path, async () => {
      await makeFolders(this.#folder)
      await this.#removeLeft()
      try {
        await writeFile(temporary, JSON.stringify({ type, location }), { mode: 0o600, flush: true })
        await rename(temporary, path)
      } catch (error) {
        await rm(temporary, { force: true })
        throw error
      }
    })
  }

  /** The backups that went to a storage. */
  async backupsOn(storage: StorageReference): Promise<string[]> {
    const found: string[] = []
    for (const name of await namesIn(this.#folder)) {
      const backup = name.slice(0, -'.json'.length)
      if (!name.endsWith('.json') || !isBackupId(backup)) continue
      const went = await this.#read(backup)
      if (went && isSameStorage(went, storage)) found.push(backup)
    }
    return found
  }

  /** The storage that a backup went to; undefined where that is not known. */
  async storageOf(backup: string): Promise<StorageReference | undefined> {
    return isBackupId(backup) ? this.#read(backup) : undefined
  }

  /** No disk has the mark any more. */
  async remove(backup: string): Promise<void> {
    const path = this.#path(backup)
    await inStateFolder(path, () => rm(path, { force: true }))
  }

  async #read(backup: string): Promise<StorageReference | undefined> {
    const text = await textOf(this.#path(backup)) // undefined: removed since
    try {
      return text === undefined ? undefined : storageReference.parse(JSON.parse(text))
    } catch {
      return undefined // what cannot be read tells nothing, and the mark stays
    }
  }

  /** Of a process that was killed before its file had a name. Another one may be writing its own right now. */
  async #removeLeft(): Promise<void> {
    for (const name of await namesIn(this.#folder)) {
      const path = join(this.#folder, name)
      if (!name.endsWith(TEMPORARY)) continue
      const { mtimeMs } = (await statIfThere(path)) ?? { mtimeMs: Number.POSITIVE_INFINITY }
      if (Date.now() - mtimeMs > LEFT_AFTER_MS) await rm(path, { force: true })
    }
  }

  #path(backup: string): string {
    return join(this.#folder, `${backup}.json`)
  }
}
