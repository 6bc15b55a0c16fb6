import { abortError, type PutOptions, type UploadBody, unlessAborted } from '@varve/core'
import type { FtpConnection } from './connection.ts'
import { timeoutError } from './ftp-error.ts'
import type { Transfer } from './transfer.ts'
import type { UploadCursor } from './upload-cursor.ts'

/** Bytes given to the socket that it has not passed on to the system yet: enough to keep the system busy. */
const WINDOW = 512 * 1024
/** The most in one write, so that a slow connection is seen to make progress. */
const LARGEST_WRITE = 128 * 1024

/** Options of {@link sendFile}. */
export interface SendFileOptions extends PutOptions {
  /** Takes the chunks that are sent. */
  recycle: NonNullable<UploadBody['recycle']>
}

/**
 * Sends what is left of a body, and returns when the server has confirmed it. The server is the one who is timed:
 * only while bytes wait for it.
 *
 * When it throws, the transfer is still to be abandoned.
 */
export async function sendFile(
  transfer: Transfer,
  connection: FtpConnection,
  cursor: UploadCursor,
  options: SendFileOptions,
): Promise<void> {
  const { signal, onProgress, recycle } = options
  const { settings } = connection
  const { socket } = transfer
  const began = performance.now()
  let failure: { error: unknown } | undefined
  let wake: (() => void) | undefined
  let inFlight = 0
  let sent = cursor.position

  const change = () => wake?.()
  const fail = (error: unknown) => {
    failure ??= { error }
    change()
  }
  const onAbort = () => signal && fail(abortError(signal))
  const onClose = () => fail(new Error('the data connection was closed'))
  const timer = setTimeout(() => {
    if (inFlight === 0) timer.refresh()
    else fail(timeoutError('it takes no more bytes of an upload', settings.timeoutMs, settings))
  }, settings.timeoutMs)

  /** Gives part of a chunk to the socket. */
  const write = (chunk: Uint8Array, start: number): number => {
    const end = Math.min(start + LARGEST_WRITE, chunk.byteLength)
    if (inFlight === 0) timer.refresh()
    inFlight += end - start
    socket.write(chunk.subarray(start, end), error => {
      if (error) return fail(error)
      inFlight -= end - start
      sent += end - start
      timer.refresh()
      try {
        onProgress?.(sent)
        if (end === chunk.byteLength) recycle(chunk)
      } catch (thrown) {
        fail(thrown)
      }
      change()
    })
    return end
  }

  cursor.onChange = change
  signal?.addEventListener('abort', onAbort, { once: true })
  socket.once('close', onClose)
  // whatever the server says before it has all the bytes, it is not going to take the rest
  transfer.reply.then(() => fail(new Error('the server ended the transfer early')), fail)
  try {
    if (signal?.aborted) onAbort()
    let chunk: Uint8Array | undefined
    let offset = 0
    for (;;) {
      if (failure) throw failure.error
      if (cursor.failure) throw cursor.failure.error
      cursor.ask()
      if (chunk === undefined || offset === chunk.byteLength) {
        offset = 0
        chunk = cursor.take()
      }
      if (chunk !== undefined && inFlight < WINDOW) {
        offset = write(chunk, offset)
        continue
      }
      if (chunk === undefined && cursor.ended && inFlight === 0) break
      await new Promise<void>(resolve => {
        wake = resolve
      })
    }
  } finally {
    clearTimeout(timer)
    cursor.onChange = () => undefined
    signal?.removeEventListener('abort', onAbort)
    socket.removeListener('close', onClose)
  }
  socket.end()
  // what the system still holds takes no longer than all of it took
  const { timeoutMs } = settings
  const longest = timeoutMs + Math.min(performance.now() - began, 10 * timeoutMs)
  await unlessAborted(transfer.finish(longest), signal)
}
