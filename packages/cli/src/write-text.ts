import type { Writable } from 'node:stream'

/**
 * Writes lines and waits until they are out, so that the process may end. Resolves as well when nobody reads
 * any more: that is for the stream's own listener.
 */
export function writeText(stream: Writable, text: string): Promise<void> {
  return new Promise(resolve => {
    stream.write(`${text}\n`, () => resolve())
  })
}
