import { readFile, utimes } from 'node:fs/promises'
import { join } from 'node:path'
import { isBackupId } from '../../src/backup-id.ts'
import { filesIn } from './files-in.ts'

/** What a ledger may hold: a file for each backup whose bitmap or snapshot may be on the disks. */
const MARK = /^marks\/[^/]+\/([^/]+)\.json$/

/**
 * Rejects where a state folder holds anything but the records of marks, each whole. One that was being written when its
 * process was killed may have its temporary name: it is made old here, so that the next backup removes it.
 */
export async function expectCleanState(stateDir: string): Promise<void> {
  for (const path of await filesIn(stateDir)) {
    if (MARK.test(path.replace(/\.tmp$/, '')) && path.endsWith('.tmp')) {
      await utimes(join(stateDir, path), 0, 0)
      continue
    }
    const [, id = ''] = MARK.exec(path) ?? []
    if (!isBackupId(id)) throw new Error(`the state folder holds ${path}`)
    const { type, location } = JSON.parse(await readFile(join(stateDir, path), 'utf8'))
    if (!type || !location) throw new Error(`${path} does not tell a storage`)
  }
}

/** Rejects where a temporary file is there still. */
export async function expectNoTemporaryState(stateDir: string): Promise<void> {
  const left = (await filesIn(stateDir)).filter(path => path.endsWith('.tmp'))
  if (left.length > 0) throw new Error(`a backup later the state folder holds ${left.join(', ')}`)
}
