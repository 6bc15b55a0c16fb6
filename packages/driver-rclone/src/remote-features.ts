import { parseObject, type Redact } from './json-output.ts'

/** What a remote can do, as `rclone backend features` tells. */
export interface RemoteFeatures {
  /** It takes an upload whose size is not known. Without it rclone would spool the data to a local disk. */
  readonly streamingUpload: boolean
  /** Two files of one folder may have the same name, so an upload replaces nothing. */
  readonly duplicateNames: boolean
  /** It has folders of its own, which are made before a file can be in them; in a bucket there is nothing to make. */
  readonly hasFolders: boolean
  /** It tells how much space is left. */
  readonly tellsSpace: boolean
  /** It may keep parts of uploads that never came to an end, as S3 does. */
  readonly keepsParts: boolean
}

/** The features in what `rclone backend features` prints. @throws STORAGE_FAILED */
export function parseFeatures(json: string, redact: Redact): RemoteFeatures {
  const { Features } = parseObject(json, 'backend features', redact)
  const has = (name: string) => (Features as Record<string, unknown> | undefined)?.[name] === true
  return {
    streamingUpload: has('PutStream'),
    duplicateNames: has('DuplicateFiles'),
    hasFolders: has('CanHaveEmptyDirectories'),
    tellsSpace: has('About'),
    keepsParts: has('CleanUp'),
  }
}
