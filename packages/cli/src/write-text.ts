import type { Writable } from 'node:stream'
import { errorMessage, VarveError } from '@varve/core'

/** What a stream says when nobody reads it any more, such as `head` or an SSH session that has ended. */
const READER_GONE = new Set(['EPIPE', 'EIO', 'ERR_STREAM_DESTROYED'])

/**
 * Writes lines and waits until they are out, so that the process may end. Resolves as well when nobody reads
 * any more.
 *
 * @throws OUTPUT_FAILED, as on a full disk
 */
export function writeText(stream: Writable, text: string): Promise<void> {
  return new Promise((resolve, reject) => {
    stream.write(`${text}\n`, error => {
      if (!error || ('code' in error && READER_GONE.has(String(error.code)))) resolve()
      else reject(outputError(error))
    })
  })
}

function outputError(cause: Error): VarveError {
  return new VarveError(
    'OUTPUT_FAILED',
    `The result could not be written to standard output: ${errorMessage(cause)}. What the command did is done; "varve list" shows the backups. Make room where the output goes before the next command.`,
    { context: { output: 'stdout' }, cause },
  )
}
