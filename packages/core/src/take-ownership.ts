import { chmod, chown } from 'node:fs/promises'
import { statIfThere } from './stat-if-there.ts'

/** The new file belongs to whom the old one did. */
export async function takeOwnership(temporary: string, target: string): Promise<void> {
  const old = await statIfThere(target)
  if (!old) return
  await chmod(temporary, old.mode & 0o7777)
  await chown(temporary, old.uid, old.gid)
}
