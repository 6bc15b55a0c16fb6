import { abortError } from '@varve/core'

/**
 * How many calls of local storages may be in the kernel at once, of all that this process works with. Each holds one of
 * libuv's four threads, and on a mount that hangs it does so until the server answers again. The other two are left for
 * whatever else the process does, such as bringing a running instance back onto its disks.
 */
const MOST = 2

let free = MOST
const waiting = new Set<() => void>()

/**
 * Makes one call to the file system of a storage, as soon as it may. One that is under way cannot be given up; one that
 * waits is, with `ABORTED`, and is then never made.
 *
 * @param call makes one call, or several one after the other, and waits for no other {@link fileCall}
 */
export async function fileCall<T>(call: () => Promise<T>, signal?: AbortSignal): Promise<T> {
  if (free > 0) free--
  else await turn(signal)
  try {
    return await call()
  } finally {
    const [next] = waiting
    if (next) next()
    else free++
  }
}

/** Resolves when a call has ended, in whose place another may be made. */
async function turn(signal: AbortSignal | undefined): Promise<void> {
  if (signal?.aborted) throw abortError(signal)
  const { promise, resolve, reject } = Promise.withResolvers<void>()
  const begin = () => {
    waiting.delete(begin)
    resolve()
  }
  const giveUp = () => {
    if (signal && waiting.delete(begin)) reject(abortError(signal))
  }
  waiting.add(begin)
  signal?.addEventListener('abort', giveUp, { once: true })
  try {
    await promise
  } finally {
    signal?.removeEventListener('abort', giveUp)
  }
}
