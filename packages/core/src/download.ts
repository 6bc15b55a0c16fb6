import { addAbortSignal } from 'node:stream'
import { setTimeout as sleep } from 'node:timers/promises'
import { abortError, errorMessage, isVarveError, VarveError } from './errors.ts'
import type { ByteRange, StorageDriver } from './storage.ts'

/** How a download that breaks off goes on. */
export interface DownloadRetry {
  /** Tries without a new byte between them, before the download fails. Default: 5. */
  readonly attempts?: number
  /** Milliseconds before the second try; doubled for each one after it. Default: 500. */
  readonly backoffMs?: number
  /** Milliseconds without a byte after which a try counts as broken. Default: 60,000. */
  readonly stallMs?: number
}

/** What {@link download} reads. */
export interface DownloadOptions {
  readonly storage: StorageDriver
  readonly key: string
  readonly range: ByteRange
  readonly signal: AbortSignal
  readonly retry?: DownloadRetry | undefined
}

/** Where the bytes of a download go. */
export interface DownloadSink {
  /** Takes the next chunk, and is done with its memory when the promise resolves. */
  write(chunk: Uint8Array): Promise<void>
  /** Drops what is not complete; returns the offset in the object from which the next try begins. */
  restart(): number
}

/**
 * Reads a range of an object into `sink`. Where the storage breaks off, stalls or ends early, it is asked
 * again for what the sink does not have yet.
 */
export async function download(options: DownloadOptions, sink: DownloadSink): Promise<void> {
  const { attempts = 5, backoffMs = 500, stallMs = 60_000 } = options.retry ?? {}
  let start = options.range.start
  for (let attempt = 1; ; attempt++) {
    try {
      return await downloadOnce({ ...options, range: { start, end: options.range.end } }, stallMs, sink)
    } catch (error) {
      const from = sink.restart()
      if (options.signal.aborted) throw abortError(options.signal)
      if (from > start) attempt = 1
      start = from
      if (!isVarveError(error) || !error.retryable || attempt >= attempts) throw error
      await sleep(backoffMs * 2 ** (attempt - 1), undefined, { signal: options.signal }).catch(() => {
        throw abortError(options.signal)
      })
    }
  }
}

async function downloadOnce(options: DownloadOptions, stallMs: number, sink: DownloadSink): Promise<void> {
  const { storage, key, range } = options
  const stall = new AbortController()
  let received = 0
  let writing = false
  const timer = setTimeout(() => {
    if (writing)
      timer.refresh() // waiting for our own side is no stall
    else stall.abort(stalled(key, range.start + received, stallMs))
  }, stallMs)
  const signal = AbortSignal.any([options.signal, stall.signal])
  try {
    const stream = addAbortSignal(signal, await storage.get(key, { range, signal }))
    for await (const chunk of stream) {
      timer.refresh()
      received += chunk.length
      if (received > range.end - range.start) throw ranOver(key, range)
      writing = true
      await sink.write(chunk)
      stream.recycle?.(chunk)
      writing = false
    }
  } catch (error) {
    if (signal.aborted) throw abortError(signal)
    if (isVarveError(error)) throw error
    throw new VarveError('STORAGE_FAILED', `The download of ${key} broke off: ${errorMessage(error)}`, {
      context: { key, offset: range.start + received },
      cause: error,
      retryable: true,
    })
  } finally {
    clearTimeout(timer)
  }
  if (received < range.end - range.start) throw endedEarly(key, range.start + received, range.end)
}

function stalled(key: string, offset: number, stallMs: number): VarveError {
  const message = `No byte of ${key} came for ${stallMs / 1000} seconds. Check the connection to the storage.`
  return new VarveError('TIMEOUT', message, { context: { key, offset, stallMs }, retryable: true })
}

function ranOver(key: string, range: ByteRange): VarveError {
  const message = `The storage sent more of ${key} than bytes ${range.start} to ${range.end}. Check the storage's driver.`
  return new VarveError('STORAGE_FAILED', message, { context: { key, ...range } })
}

function endedEarly(key: string, offset: number, end: number): VarveError {
  const message = `The download of ${key} ended at byte ${offset}, ${end - offset} bytes before its end. Check the connection to the storage.`
  return new VarveError('STORAGE_FAILED', message, { context: { key, offset, end }, retryable: true })
}
