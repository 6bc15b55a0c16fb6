import { dirname } from 'node:path'
import { fileIdentity } from './bitmap-twin.ts'
import { statIfThere } from './stat-if-there.ts'

/** What can be told of a file: `gone` where it was removed, or never made. */
export type Presence = 'there' | 'gone' | 'unknown'

/** Tells the folder of a file from any other one at its path, such as what is there while nothing is mounted on it. */
export function folderIdentity(path: string): Promise<string> {
  return fileIdentity(dirname(path))
}

/**
 * Whether a file is there. That its path leads nowhere does not tell that it is gone: after a boot its file system may not be
 * mounted yet. The very folder that it was in tells it.
 *
 * @param folder the {@link folderIdentity} of then; without it nothing tells that a file is gone
 */
export async function presenceOf(path: string, folder: string | undefined): Promise<Presence> {
  // The folder first: it may be mounted in between.
  const isThatFolder =
    folder !== undefined && (await statIfThere(dirname(path))) && (await folderIdentity(path)) === folder
  if (await statIfThere(path)) return 'there'
  return isThatFolder ? 'gone' : 'unknown'
}
