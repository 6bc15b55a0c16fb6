import { constants } from 'node:fs'
import { mkdtemp, open, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { inTemporaryFolder } from './state-folder.ts'

/** open(2): a file that has no name in its folder, and is gone once nobody has it open. Node has no constant for it. */
const O_TMPFILE = 0o20000000 | constants.O_DIRECTORY

/** A file without a name in any folder. Disposing of it removes it. */
export interface NamelessFile extends AsyncDisposable {
  /** Where a program that this process starts can open it. */
  readonly path: string
}

/** A file that holds a text and of which nothing stays when this process is killed. @throws STATE_DIR_FAILED */
export function namelessFile(text: string): Promise<NamelessFile> {
  return inTemporaryFolder(tmpdir(), () => writeNameless(text))
}

async function writeNameless(text: string): Promise<NamelessFile> {
  const file = await open(tmpdir(), constants.O_RDWR | O_TMPFILE, 0o600).catch(openAndRemove)
  const close = () => file.close()
  try {
    await file.writeFile(text)
  } catch (error) {
    await close()
    throw error
  }
  return { path: `/proc/${process.pid}/fd/${file.fd}`, [Symbol.asyncDispose]: close }
}

/** For file systems that have no such files, such as NFS. */
async function openAndRemove(error: unknown): ReturnType<typeof open> {
  const code = error instanceof Error && 'code' in error ? error.code : undefined
  if (code !== 'EOPNOTSUPP' && code !== 'EISDIR') throw error
  const folder = await mkdtemp(join(tmpdir(), 'varve-'))
  try {
    return await open(join(folder, 'file'), 'wx+', 0o600)
  } finally {
    await rm(folder, { recursive: true })
  }
}
