import type { Readable } from 'node:stream'
import { abortError, VarveError } from './errors.ts'

/** How long after an abort a call may take to clean up, in milliseconds. */
const GRACE_MS = 10_000

/** What `work` comes to, or `ABORTED` as soon as the signal says so; `work` itself goes on. */
export async function unlessAborted<T>(work: Promise<T>, signal: AbortSignal | undefined): Promise<T> {
  return signal ? giveUpAfter(0, work, signal) : work
}

/**
 * What `work` comes to, where it ends itself soon after an abort. A storage that hangs does not let it, though: after
 * a grace period of 10 s the caller gets `ABORTED` all the same.
 */
export async function endsAfterAbort<T>(work: Promise<T>, signal: AbortSignal | undefined): Promise<T> {
  return signal ? giveUpAfter(GRACE_MS, work, signal) : work
}

/**
 * Has an abort destroy a download, whose error is then `ABORTED`. To be called by the driver that made the stream: until its
 * consumer has it, and where that has given up as well and never takes it, nobody else hears of the error.
 */
export function destroyOnAbort(stream: Readable, signal: AbortSignal | undefined): void {
  if (!signal) return
  const giveUp = () => {
    stream.on('error', () => undefined)
    stream.destroy(abortError(signal))
  }
  signal.addEventListener('abort', giveUp, { once: true })
  stream.once('close', () => signal.removeEventListener('abort', giveUp))
  if (signal.aborted) giveUp()
}

async function giveUpAfter<T>(graceMs: number, work: Promise<T>, signal: AbortSignal): Promise<T> {
  const { promise: givenUp, reject } = Promise.withResolvers<never>()
  let timer: NodeJS.Timeout | undefined
  const onAbort = () => {
    if (graceMs === 0) return reject(abortError(signal))
    timer = setTimeout(() => {
      const { message } = abortError(signal)
      const more = `The storage has not answered for ${graceMs / 1000} s; an unfinished upload may be left on it.`
      const context = { unanswered: true }
      reject(new VarveError('ABORTED', `${message}. ${more}`, { context, cause: signal.reason }))
    }, graceMs)
  }
  signal.addEventListener('abort', onAbort, { once: true })
  if (signal.aborted) onAbort()
  try {
    return await Promise.race([work, givenUp])
  } finally {
    clearTimeout(timer)
    signal.removeEventListener('abort', onAbort)
  }
}
