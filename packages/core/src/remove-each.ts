import { isVarveError } from './errors.ts'

/**
 * Removes what a clean-up of a storage has found and returns how much that was. What the storage denies keeps nothing
 * else from being removed: the first such error is thrown at the end.
 *
 * @param remove resolves to whether it removed the item
 */
export async function removeEach<T>(
  found: AsyncIterable<T>,
  remove: (item: T) => Promise<boolean>,
): Promise<number> {
  let removed = 0
  let denied: unknown
  for await (const item of found) {
    try {
      if (await remove(item)) removed++
    } catch (error) {
      if (!isVarveError(error, 'STORAGE_ACCESS_DENIED')) throw error
      denied ??= error
    }
  }
  if (denied !== undefined) throw denied
  return removed
}
