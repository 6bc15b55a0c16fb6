import type { RcloneProcess } from './rclone-process.ts'

/** Bytes that wait to be taken by rclone before the source has to wait. */
const MOST_WAITING = 2 * 1024 * 1024

/** Writes chunks to an rclone, a few at once. Resolves when it has taken all of them, and has been told so. */
export async function feed(
  { stdin, watch, exited }: RcloneProcess,
  chunks: AsyncIterable<Uint8Array>,
  onTaken: ((chunk: Uint8Array) => void) | undefined,
): Promise<void> {
  if (stdin === null) throw new TypeError('this rclone has no input')
  let waiting = 0
  let wake: (() => void) | undefined
  let held: Disposable | undefined = watch.hold()
  exited.then(() => wake?.())
  const taken = (chunk: Uint8Array, error: unknown) => {
    waiting -= chunk.byteLength
    watch.progress()
    if (waiting === 0) held = watch.hold() // it is up to the source now
    wake?.()
    if (!error) onTaken?.(chunk)
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
  }
  held?.[Symbol.dispose]()
  stdin.end()
}
