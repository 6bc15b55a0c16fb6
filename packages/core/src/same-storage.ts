import type { StorageReference } from './journal.ts'

/** Whether two references are to one storage. Who configures it may write its path with a slash at the end or without. */
export function isSameStorage(one: StorageReference, other: StorageReference): boolean {
  return one.type === other.type && withoutSlash(one.location) === withoutSlash(other.location)
}

function withoutSlash(location: string): string {
  return location.replace(/\/+$/, '')
}
