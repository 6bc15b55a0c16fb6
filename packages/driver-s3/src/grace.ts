/** How long after an abort the storage may take to say how an upload stands, in milliseconds. */
export const GRACE_MS = 10_000

/** Makes a call whose outcome has to be known: it is given up {@link GRACE_MS} after `signal` fires. */
export async function withGrace<T>(
  signal: AbortSignal | undefined,
  call: (late: AbortSignal | undefined) => Promise<T>,
): Promise<T> {
  if (signal === undefined) return call(undefined)
  const later = new AbortController()
  let timer: NodeJS.Timeout | undefined
  const begin = () => {
    timer = setTimeout(() => later.abort(signal.reason), GRACE_MS)
  }
  if (signal.aborted) begin()
  else signal.addEventListener('abort', begin, { once: true })
  try {
    return await call(later.signal)
  } finally {
    signal.removeEventListener('abort', begin)
    clearTimeout(timer)
  }
}

/** The option of the SDK's `send`. */
export function abortBy(signal: AbortSignal | undefined): { abortSignal?: AbortSignal } {
  return signal ? { abortSignal: signal } : {}
}
