/** How long after an abort the storage may take to say how an upload stands, in milliseconds. */
export const GRACE_MS = 10_000

/** A signal that fires {@link GRACE_MS} after another: for calls whose outcome has to be known. */
export function soonAfter(signal: AbortSignal): AbortSignal
export function soonAfter(signal: AbortSignal | undefined): AbortSignal | undefined
export function soonAfter(signal: AbortSignal | undefined): AbortSignal | undefined {
  if (signal === undefined) return undefined
  const later = new AbortController()
  const begin = () => setTimeout(() => later.abort(signal.reason), GRACE_MS).unref()
  if (signal.aborted) begin()
  else signal.addEventListener('abort', begin, { once: true })
  return later.signal
}

/** The option of the SDK's `send`. */
export function abortBy(signal: AbortSignal | undefined): { abortSignal?: AbortSignal } {
  return signal ? { abortSignal: signal } : {}
}
