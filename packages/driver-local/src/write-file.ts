import type { FileHandle } from 'node:fs/promises'
import { type PutOptions, readUpload, type UploadBody } from '@varve/core'
import { fileCall } from './file-call.ts'

/**
 * Writes of one file under way at once. The kernel lets one of them into the file at a time, so two keep it
 * busy while the source fetches more; further ones would only hold more of libuv's four threads.
 */
const WRITES_IN_FLIGHT = 2
/** The most that one write takes, so that an abort is soon noticed. */
const LARGEST_WRITE = 8 * 1024 * 1024

/** Options of {@link writeFile}. */
export interface WriteFileOptions extends PutOptions {
  key: string
}

/**
 * Writes a body to the beginning of a file and returns its length. When it throws, no write is under way
 * any more.
 */
export async function writeFile(
  file: FileHandle,
  body: UploadBody,
  { key, signal, onProgress }: WriteFileOptions,
): Promise<number> {
  // a failed write ends the source at once, also while the source gives nothing
  const broken = new AbortController()
  const inFlight = new Set<Promise<void>>()
  const ends = signal ? AbortSignal.any([signal, broken.signal]) : broken.signal
  let failure: { error: unknown } | undefined
  let position = 0
  let written = 0

  async function write(chunk: Uint8Array, at: number): Promise<void> {
    try {
      for (let done = 0; done < chunk.byteLength; ) {
        const length = Math.min(chunk.byteLength - done, LARGEST_WRITE)
        const { bytesWritten } = await fileCall(() => file.write(chunk, done, length, at + done), ends)
        if (bytesWritten === 0) throw new Error('the file system takes no more bytes')
        done += bytesWritten
        written += bytesWritten
        onProgress?.(written)
      }
      body.recycle?.(chunk)
    } catch (error) {
      failure ??= { error }
      broken.abort(error)
    }
  }

  try {
    for await (const chunk of readUpload(body, { key, signal: ends })) {
      const writing = write(chunk, position).finally(() => inFlight.delete(writing))
      inFlight.add(writing)
      position += chunk.byteLength
      while (inFlight.size >= WRITES_IN_FLIGHT) await Promise.race(inFlight)
      if (failure) break
    }
  } catch (error) {
    failure ??= { error }
  } finally {
    await Promise.all(inFlight)
  }
  if (failure) throw failure.error
  return position
}
