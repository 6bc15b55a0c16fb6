import { open, stat } from 'node:fs/promises'
import { fileIdentity } from './bitmap-twin.ts'
import { statIfThere } from './stat-if-there.ts'

/** A file at a moment from which on nobody is to write to it. */
export interface FileState {
  /** Its {@link fileIdentity}. */
  readonly identity: string
  /** When it was last written to, in nanoseconds. Giving it another owner, as libvirt does, is no write. */
  readonly writtenAt: string
}

/** What became of a file since a moment: `written` is also one whose time is an earlier one, as clocks are set back. */
export type FileChange = 'none' | 'written' | 'replaced' | 'gone'

/** How a file is, with a time that a power cut does not take back; undefined of a block device, which tells none. */
export async function fileState(path: string): Promise<FileState | undefined> {
  await using file = await open(path)
  if (!(await file.stat()).isFile()) return undefined
  await file.sync()
  const { mtimeNs } = await file.stat({ bigint: true })
  return { identity: await fileIdentity(path), writtenAt: String(mtimeNs) }
}

/** What became of a file since then. */
export async function changeSince(path: string, { identity, writtenAt }: FileState): Promise<FileChange> {
  if (!(await statIfThere(path))) return 'gone'
  if ((await fileIdentity(path)) !== identity) return 'replaced'
  const { mtimeNs } = await stat(path, { bigint: true })
  return String(mtimeNs) === writtenAt ? 'none' : 'written'
}
