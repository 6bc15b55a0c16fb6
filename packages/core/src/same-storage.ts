import type { StorageReference } from './journal.ts'

/**
 * Whether two references are to one storage. Who configures it may write its path with a slash at the end or without, and
 * a record of an address on an FTP or SFTP server may be from before those had the user in them.
 */
export function isSameStorage(one: StorageReference, other: StorageReference): boolean {
  if (one.type !== other.type) return false
  const [first, second] = [withoutSlash(one.location), withoutSlash(other.location)]
  return first === second || withoutUser(first) === second || first === withoutUser(second)
}

function withoutSlash(location: string): string {
  return location.replace(/\/+$/, '')
}

function withoutUser(location: string): string {
  return location.replace(/^(s?ftps?:\/\/)[^@/]*@/, '$1')
}
