import { parseObject, type Redact, unreadable } from './json-output.ts'

const COMMAND = 'backend list-multipart-uploads'

/** An upload in parts that has not come to an end, and of which there is no object. */
export interface UnfinishedUpload {
  /** The path that it was for, below the folder that was asked for. */
  readonly path: string
  /** When it began, by the server's clock. */
  readonly begunAt: Date
}

/**
 * The uploads below a folder in what `rclone backend list-multipart-uploads` prints: by bucket, those whose keys begin
 * with the folder's name, such as those in `backups2` for `backups`. Keys begin in the bucket, wherever the remote does.
 *
 * @throws STORAGE_FAILED
 */
export function parseUploads(json: string, folder: string, redact: Redact): UnfinishedUpload[] {
  const path = folder.replace(/^\//, '')
  const uploads: UnfinishedUpload[] = []
  for (const [bucket, entries] of Object.entries(parseObject(json, COMMAND, redact))) {
    if (!Array.isArray(entries)) throw unreadable(json, COMMAND, redact)
    for (const { Key, Initiated } of entries) {
      if (typeof Key !== 'string' || typeof Initiated !== 'string') throw unreadable(json, COMMAND, redact)
      const below = pathBelow(path, `/${bucket}/${Key}`)
      if (below !== undefined) uploads.push({ path: below, begunAt: new Date(Initiated) })
    }
  }
  return uploads
}

function pathBelow(folder: string, path: string): string | undefined {
  if (folder === '') return path.slice(1)
  const start = path.indexOf(`/${folder}/`) // a remote may itself begin somewhere in the bucket
  return start < 0 ? undefined : path.slice(start + folder.length + 2)
}
