import { link, open, rename, rm, stat } from 'node:fs/promises'
import { dirname } from 'node:path'
import { VarveError } from './errors.ts'
import type { Rename } from './journal.ts'
import { statIfThere } from './stat-if-there.ts'

/**
 * Gives a complete file its name, durably. May be cut short and called again, as long as the file has its temporary
 * name.
 *
 * @throws TARGET_EXISTS where the name was to be new and is taken; nothing is changed then
 */
export async function putInPlace({ temporary, target, isNew }: Rename): Promise<void> {
  if (isNew) await linkInPlace(temporary, target)
  else await rename(temporary, target)
  const folder = await open(dirname(target))
  try {
    await folder.sync()
  } finally {
    await folder.close()
  }
}

/** Refuses a name that is taken by another file than the one which is to get it. @throws TARGET_EXISTS */
export async function assertNameIsFree({ temporary, target }: Rename): Promise<void> {
  const there = await statIfThere(target)
  if (!there) return
  const ours = await stat(temporary)
  if (there.dev === ours.dev && there.ino === ours.ino) return // a former try ended before it was done
  throw new VarveError(
    'TARGET_EXISTS',
    `${target} was not there when the restore began and is there by now, so somebody else made it. It is left alone; move it away or choose another path.`,
    { context: { path: target } },
  )
}

/** A rename would replace whatever has appeared at the target; a link does not. */
async function linkInPlace(temporary: string, target: string): Promise<void> {
  const created = await link(temporary, target).then(
    () => true,
    () => false, // the name is taken, or the file system has no links, as FAT: either is found out now
  )
  if (!created) await assertNameIsFree({ temporary, target })
  const linked = created || (await statIfThere(target)) !== undefined
  await (linked ? rm(temporary) : rename(temporary, target))
}
