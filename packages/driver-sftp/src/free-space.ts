import type { StorageRoot } from './session.ts'
import { isStatus, STATUS } from './sftp-error.ts'

/** The room on the file system of a storage. */
export interface FreeSpace {
  /** Bytes that the user can still write. */
  readonly bytes: number
  /** Whether no more files can be made, which says nothing of the bytes. */
  readonly noFiles: boolean
}

/** The room that is left, where the server tells (`statvfs@openssh.com`). */
export async function freeSpace(root: StorageRoot, signal?: AbortSignal): Promise<FreeSpace | undefined> {
  try {
    const { f_bavail, f_frsize, f_files, f_favail } = await root.connection.call<Record<string, unknown>>(
      (sftp, done) => sftp.ext_openssh_statvfs(root.path, done),
      { signal },
    )
    // file systems that count no files say that there are 0
    return {
      bytes: Number(f_bavail) * Number(f_frsize),
      noFiles: Number(f_files) > 0 && Number(f_favail) === 0,
    }
  } catch (error) {
    if (isStatus(error, STATUS.OP_UNSUPPORTED, STATUS.FAILURE)) return undefined
    throw error
  }
}
