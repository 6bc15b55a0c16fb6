import { chmod, chown, stat } from 'node:fs/promises'
import { errorMessage, VarveError } from './errors.ts'
import { statIfThere } from './stat-if-there.ts'

/** The new file belongs to whom the old one did. @throws TARGET_FAILED */
export async function takeOwnership(temporary: string, target: string): Promise<void> {
  try {
    const old = await statIfThere(target)
    if (!old) return
    const { uid, gid, mode } = await stat(temporary)
    if (((mode ^ old.mode) & 0o7777) !== 0) await chmod(temporary, old.mode & 0o7777)
    // Also where it would change nothing it is refused to whoever does not own the file.
    if (uid !== old.uid || gid !== old.gid) await chown(temporary, old.uid, old.gid)
  } catch (error) {
    throw new VarveError(
      'TARGET_FAILED',
      `The new file cannot have the owner and the permissions of ${target}, which it is to replace: ${errorMessage(error)}. Restore as root or as the owner of that file, or to a path of its own. Nothing was changed.`,
      { context: { path: target }, cause: error },
    )
  }
}
