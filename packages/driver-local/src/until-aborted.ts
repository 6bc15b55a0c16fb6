import { abortError, unlessAborted } from '@varve/core'

/** The items as they come, until the signal ends it with `ABORTED`. */
export async function* untilAborted<T>(
  items: AsyncGenerator<T>,
  signal: AbortSignal | undefined,
): AsyncGenerator<T> {
  try {
    for (;;) {
      if (signal?.aborted) throw abortError(signal)
      const next = await unlessAborted(items.next(), signal)
      if (next.done) return
      yield next.value
    }
  } finally {
    await unlessAborted(items.return(undefined), signal)
  }
}
