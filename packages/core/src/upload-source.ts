import { finished, type Readable } from 'node:stream'
import { abortError, errorMessage, isVarveError, VarveError } from './errors.ts'
import type { ByteRange, UploadBody } from './storage.ts'

/** Options of {@link readUpload}. */
export interface ReadUploadOptions {
  /** The key that is uploaded, for messages. */
  key: string
  /** Only these bytes of a replayable body. Default: all. */
  range?: ByteRange
  /** Destroys the source and ends the iteration with `ABORTED`, also while the source gives nothing. */
  signal?: AbortSignal
}

/**
 * The chunks of a body, for a driver to store, each the very one that the source gave: it can be recycled.
 * The iteration ends normally only when the source gave exactly the bytes that it had promised; the source
 * is destroyed in any case.
 *
 * @throws UPLOAD_FAILED when the source fails, is too short or too long, or gives something else than bytes;
 *   a VarveError of the source is thrown as it is
 * @throws ABORTED
 */
export async function* readUpload(body: UploadBody, options: ReadUploadOptions): AsyncGenerator<Uint8Array> {
  const { key, range, signal } = options
  const expected = range ? range.end - range.start : body.size
  if (signal?.aborted) throw abortError(signal)
  let source: Readable | undefined
  let size = 0
  try {
    source = body.open(range)
    for await (const chunk of chunksOf(source, signal)) {
      if (!(chunk instanceof Uint8Array)) throw new TypeError(`it gave a ${typeof chunk} in place of bytes`)
      size += chunk.byteLength
      if (expected !== undefined && size > expected)
        throw new RangeError(`it gave more than the ${expected} bytes that it should have`)
      if (chunk.byteLength > 0) yield chunk
    }
    if (expected !== undefined && size < expected)
      throw new RangeError(`it ended after ${size} of ${expected} bytes`)
  } catch (error) {
    if (isVarveError(error)) throw error
    throw new VarveError(
      'UPLOAD_FAILED',
      `The source of ${key} failed: ${errorMessage(error)}. See that what is uploaded is there and readable to its end, and try again.`,
      {
        context: { key, bytesRead: size, bytesExpected: expected },
        cause: error,
      },
    )
  } finally {
    source?.destroy()
  }
}

/**
 * The chunks of a stream one by one. A stream's own iterator joins those that wait in its buffer: a copy, and
 * no chunk to recycle. It also waits for the source to close, which one that hangs never does.
 */
async function* chunksOf(source: Readable, signal: AbortSignal | undefined): AsyncGenerator<unknown> {
  const waiting: unknown[] = []
  let end: { error: unknown } | undefined
  let wake: (() => void) | undefined
  const finish = (error: unknown) => {
    end ??= { error }
    wake?.()
  }
  const giveUp = () => signal && finish(abortError(signal))
  source.on('data', chunk => {
    source.pause()
    waiting.push(chunk)
    wake?.()
  })
  // Its listeners stay, so that an error of a source that was given up ends no process.
  finished(source, { writable: false }, finish)
  signal?.addEventListener('abort', giveUp, { once: true })
  try {
    for (;;) {
      if (end?.error) throw end.error
      const chunk = waiting.shift()
      if (chunk !== undefined) yield chunk
      else if (end) return
      else {
        const woken = new Promise<void>(resolve => {
          wake = resolve
        })
        source.resume()
        await woken
      }
    }
  } finally {
    signal?.removeEventListener('abort', giveUp)
  }
}
