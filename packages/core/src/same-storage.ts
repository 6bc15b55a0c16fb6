import type { StorageReference } from './journal.ts'

/**
 * Whether two references are to one storage. Who configures it may write its path with a slash at the end or without, and
 * a record of an address on an FTP or SFTP server may be from before those had the user in them, and those on an FTP server
 * a second slash before an absolute path.
 */
export function isSameStorage(one: StorageReference, other: StorageReference): boolean {
  if (one.type !== other.type) return false
  const [first, second] = [withoutSlash(one.location), withoutSlash(other.location)]
  return first === second || formerly(first) === second || first === formerly(second)
}

/** But right behind a remote or a server, where it leads to the root, and not to the folder that a login begins in. */
function withoutSlash(location: string): string {
  return location.replace(/(?<=[^/:])(?<!^[^/]+:\/\/[^/]*)\/+$/, '')
}

/** As it was before it had the user in it. */
function formerly(location: string): string {
  return location.replace(/^(s?ftps?:\/\/)[^@/]*@/, '$1').replace(/^(ftps?:\/\/[^/]*\/)\//, '$1')
}
