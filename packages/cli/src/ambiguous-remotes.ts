import { isDeepStrictEqual } from 'node:util'
import { fieldName } from './config-error.ts'

/** An entry of the configuration's storages. */
interface Entry {
  readonly type: string
  readonly [option: string]: unknown
}

/**
 * Says which storages through rclone go by the same name and path, though their remotes are configured otherwise: what is
 * recorded of the backups on one of them would be taken for the other's.
 */
export function ambiguousRemotes(storages: Readonly<Record<string, Entry>>): string[] {
  const seen = new Map<string, { name: string; entry: Entry }>()
  return Object.entries(storages).flatMap(([name, entry]) => {
    if (entry.type !== 'rclone') return []
    const place = `${entry.remoteName}:${String(entry.pathPrefix ?? '').replace(/(?<=.)\/+$/, '')}`
    const other = seen.get(place)
    if (!other) seen.set(place, { name, entry })
    if (!other || isDeepStrictEqual(remoteOf(entry), remoteOf(other.entry))) return []
    return [
      `${fieldName(['storages', name])}: ${place} is another place than that of ${other.name}, and cannot be told from it: give the remote another name`,
    ]
  })
}

/** By what options a remote's name has its meaning. */
function remoteOf({ configFile, remotes }: Entry): unknown {
  return { configFile, remotes }
}
