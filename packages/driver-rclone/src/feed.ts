import { VarveError } from '@varve/core'
import type { RcloneProcess } from './rclone-process.ts'

/** Bytes that wait to be taken by rclone before the source has to wait. */
const MOST_WAITING = 2 * 1024 * 1024
/** The most time for the end of an upload, on top of the usual, in milliseconds: some servers put it together then. */
const LONGEST_END_MS = 600_000

/**
 * Writes chunks to an rclone, a few at once, until the source has ended, and waits for rclone to end. An rclone that
 * ends well before that has to have all bytes: it may take what the size says and not look for an end.
 *
 * @throws UPLOAD_FAILED when rclone ended well and has not taken every chunk; what the source throws
 */
export async function feed(
  { stdin, watch, exited }: RcloneProcess,
  chunks: AsyncIterable<Uint8Array>,
  onTaken: (chunk: Uint8Array) => void,
): Promise<void> {
  if (stdin === null) throw new TypeError('this rclone has no input')
  const began = performance.now()
  let waiting = 0
  let refused = false
  let ended = false
  let wake: (() => void) | undefined
  let held: Disposable | undefined = watch.hold()
  exited.then(() => wake?.())
  const taken = (chunk: Uint8Array, error: unknown) => {
    waiting -= chunk.byteLength
    watch.progress()
    if (waiting === 0 && !ended) held ??= watch.hold() // it is up to the source now
    if (error) refused = true
    else onTaken(chunk)
    wake?.()
  }
  for await (const chunk of chunks) {
    waiting += chunk.byteLength
    held?.[Symbol.dispose]()
    held = undefined
    stdin.write(chunk, error => taken(chunk, error))
    while (waiting > MOST_WAITING && stdin.writable) {
      await new Promise<void>(resolve => {
        wake = resolve
      })
    }
    if (stdin.writable || waiting === 0) continue
    refused = true
    break
  }
  ended = true
  held?.[Symbol.dispose]()
  watch.extend(Math.min(performance.now() - began, LONGEST_END_MS))
  stdin.end()
  const { exitCode, args } = await exited
  if (exitCode !== 0 || (!refused && waiting === 0)) return
  throw new VarveError(
    'UPLOAD_FAILED',
    'rclone rcat ended well, but before it had taken all bytes of the upload. Check the storage, and that command is really rclone.',
    { context: { command: 'rclone', args, exitCode }, retryable: true },
  )
}
