import { addAbortSignal } from 'node:stream'
import { setTimeout as sleep } from 'node:timers/promises'
import { abortError, errorMessage, isVarveError, VarveError } from './errors.ts'
import { unlessAborted } from './giving-up.ts'
import type { ByteRange, ObjectStream, StorageDriver } from './storage.ts'

/** How a download that breaks off goes on. */
export interface DownloadRetry {
  /** Tries without a new byte between them, before the download fails. Default: 5. */
  readonly attempts?: number
  /** Milliseconds before the second try; doubled for each one after it. Default: 500. */
  readonly backoffMs?: number
  /** Milliseconds without a byte after which a try counts as broken, less those that it waits for other calls. Default: 60,000. */
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
  /** Optional: takes the next bytes from a storage that can read right into memory, in place of `write`. */
  readonly direct?: DirectSink
  /** Drops what is not complete; returns the offset in the object from which the next try begins. */
  restart(): number
}

/** Memory in which a download's bytes arrive without being copied. */
export interface DirectSink {
  /** Where the next bytes go: at least one, and none behind the range. Until `restart` a read may be writing there. */
  room(): Promise<Uint8Array>
  /** The first `length` bytes of the room are there. */
  filled(length: number): void
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
  let queued = false
  const timer = setTimeout(() => {
    if (writing || queued)
      timer.refresh() // waiting for our own side is no stall
    else stall.abort(stalled(key, range.start + received, stallMs))
  }, stallMs)
  const onWait = (waits: boolean) => {
    queued = waits
    timer.refresh()
  }
  const signal = AbortSignal.any([options.signal, stall.signal])
  const attempt: Attempt = {
    signal,
    arrived(length) {
      timer.refresh()
      received += length
      if (received > range.end - range.start) throw ranOver(key, range)
    },
    isWhole: () => received === range.end - range.start,
    async waitFor(sinks) {
      writing = true
      const result = await sinks()
      writing = false
      return result
    },
  }
  try {
    const stream: ObjectStream = addAbortSignal(signal, await storage.get(key, { range, signal, onWait }))
    if (stream.readInto && sink.direct) await receiveDirectly(stream, sink.direct, attempt)
    else await receiveChunks(stream, sink, attempt)
  } catch (error) {
    if (options.signal.aborted) throw abortError(options.signal)
    if (stall.signal.aborted) throw stall.signal.reason
    if (isVarveError(error)) throw error
    throw new VarveError(
      'STORAGE_FAILED',
      `The download of ${key} broke off: ${errorMessage(error)}. See that the storage can be reached and is not overloaded, and try again.`,
      {
        context: { key, offset: range.start + received },
        cause: error,
        retryable: true,
      },
    )
  } finally {
    clearTimeout(timer)
  }
  if (received < range.end - range.start) throw endedEarly(key, range.start + received, range.end)
}

/** One try of a download, as those see it who receive its bytes. */
interface Attempt {
  readonly signal: AbortSignal
  /** Bytes came from the storage. Throws for more than were asked for. */
  arrived(length: number): void
  isWhole(): boolean
  /** Waits for the sink: meanwhile the storage does not stall. */
  waitFor<T>(sinks: () => Promise<T>): Promise<T>
}

async function receiveChunks(stream: ObjectStream, sink: DownloadSink, attempt: Attempt): Promise<void> {
  for await (const chunk of stream) {
    attempt.arrived(chunk.length)
    await attempt.waitFor(() => sink.write(chunk))
    stream.recycle?.(chunk)
  }
}

async function receiveDirectly(stream: ObjectStream, sink: DirectSink, attempt: Attempt): Promise<void> {
  stream.on('error', () => undefined) // the read that it breaks tells of it
  try {
    while (!attempt.isWhole()) {
      const memory = await attempt.waitFor(() => sink.room())
      // A read that hangs is left to itself, and with it the memory.
      const length = await unlessAborted(stream.readInto?.(memory) ?? Promise.resolve(0), attempt.signal)
      if (length === 0) return
      attempt.arrived(length)
      sink.filled(length)
    }
  } finally {
    stream.destroy()
  }
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
