import { setImmediate } from 'node:timers/promises'
import { expect } from 'vitest'

/** Until its end no promise of this process is rejected without anybody to handle that, by which Node would end it. */
export async function noRejectionUnhandled(): Promise<AsyncDisposable> {
  const unhandled: unknown[] = []
  const collect = (reason: unknown) => void unhandled.push(reason)
  const others = process.listeners('unhandledRejection')
  process.removeAllListeners('unhandledRejection').on('unhandledRejection', collect)
  return {
    async [Symbol.asyncDispose]() {
      await setImmediate() // Node tells of them once all that was pending is done
      process.removeListener('unhandledRejection', collect)
      for (const other of others) process.on('unhandledRejection', other)
      expect(unhandled).toEqual([])
    },
  }
}
