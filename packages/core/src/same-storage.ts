import type { StorageReference } from './journal.ts'

/** Whether two references are to one storage. In records of before, the path of a local one may end in a slash. */
export function isSameStorage(one: StorageReference, other: StorageReference): boolean {
  return one.type === other.type && withoutSlash(one.location) === withoutSlash(other.location)
}

function withoutSlash(location: string): string {
  return location.replace(/\/+$/, '')
}
