import PQueue from 'p-queue'
import { abortError } from './errors.ts'

/**
 * Does `work` for every item, a few at a time, and resolves with the outcomes in the items' order. The first
 * failure gives the others up, by the signal that each was handed, and is thrown when all have ended.
 */
export async function fanOut<Item, Outcome>(
  items: readonly Item[],
  { concurrency, signal }: { concurrency: number; signal: AbortSignal },
  work: (item: Item, signal: AbortSignal) => Promise<Outcome>,
): Promise<Outcome[]> {
  const failed = new AbortController()
  const either = AbortSignal.any([signal, failed.signal])
  const queue = new PQueue({ concurrency })
  const outcomes: Outcome[] = new Array(items.length)
  const tasks = items.map(async (item, index) =>
    queue.add(async () => {
      if (either.aborted) return
      try {
        outcomes[index] = await work(item, either)
      } catch (error) {
        failed.abort(error)
      }
    }),
  )
  await Promise.all(tasks)
  if (signal.aborted) throw abortError(signal)
  if (failed.signal.aborted) throw failed.signal.reason
  return outcomes
}
