import { abortError, type PutOptions, type StoredObject, type UploadBody, VarveError } from '@varve/core'
import type { Stats } from 'ssh2'
import { PendingFile } from './pending-file.ts'
import type { SftpSession } from './session.ts'
import { isLost, sftpError } from './sftp-error.ts'

/** How long the removal of an unfinished upload is tried. */
const DISCARD_MS = 8000

/**
 * Uploads a body. A connection that breaks is made anew: a replayable body goes on where it broke off, any other one
 * only when it is already written as a whole, or not yet begun.
 */
export async function storeObject(
  session: SftpSession,
  key: string,
  body: UploadBody,
  options: PutOptions,
): Promise<StoredObject> {
  const { signal } = options
  const file = new PendingFile(key)
  const source = new WatchedBody(body)
  const attempt = async (): Promise<StoredObject> => {
    using lease = await session.lease(signal)
    if (!file.isWhole) await file.write(lease.root, key, source, options)
    return toObject(key, await file.publish(lease.root, signal))
  }
  let failures = 0
  try {
    for (;;) {
      const { kept } = file
      try {
        return await attempt()
      } catch (error) {
        if (!isLost(error) || !(file.isWhole || source.canGoOn)) throw error
        if (file.kept > kept) failures = 0
        await session.pause(error, ++failures, signal)
      }
    }
  } catch (error) {
    const failure = signal?.aborted ? abortError(signal) : sftpError(error, 'Writing', key)
    return await discarded(session, key, file, failure)
  }
}

/**
 * Discards what there is of an upload and throws `failure`, which tells if something stays; or returns the object that
 * is stored all the same: the answer to the last request may be what got lost.
 */
async function discarded(
  session: SftpSession,
  key: string,
  file: PendingFile,
  failure: VarveError,
): Promise<StoredObject> {
  if (!file.isCreated) throw failure
  const signal = AbortSignal.timeout(DISCARD_MS)
  let stored: Stats | undefined
  try {
    stored = await session.use(root => file.discard(root, signal), signal)
  } catch {
    const { code, message, context, cause, retryable } = failure
    throw new VarveError(code, `${message} ${leftOf(key, file)}`, { context, cause, retryable })
  }
  if (stored) return toObject(key, stored)
  throw failure
}

/** What may be on the server of a file that could not be discarded, in words. */
function leftOf(key: string, { former, mayBeStored }: PendingFile): string {
  const stored = mayBeStored
    ? `Whether ${key} is stored all the same is not known: look for it, or write it again. `
    : ''
  const kept =
    former === undefined
      ? 'What was written so far could not be removed; prune removes it later.'
      : `The former ${key} may have lost its name, and is then kept as ${former}: give it back by hand, before prune removes it.`
  return stored + kept
}

/** A file as the object that it is. */
export function toObject(key: string, { size, mtime }: Stats): StoredObject {
  return { key, size, modifiedAt: new Date(mtime * 1000) }
}

/** A body that knows whether it can be opened again. */
class WatchedBody implements UploadBody {
  readonly replayable: boolean
  readonly size?: number
  readonly recycle?: (chunk: Uint8Array) => void
  readonly #body: UploadBody
  #opened = false

  constructor(body: UploadBody) {
    this.#body = body
    this.replayable = body.replayable
    if (body.size !== undefined) this.size = body.size
    if (body.recycle) this.recycle = chunk => body.recycle?.(chunk)
  }

  get canGoOn(): boolean {
    return this.replayable || !this.#opened
  }

  open(range?: { start: number; end: number }): ReturnType<UploadBody['open']> {
    this.#opened = true
    return this.#body.open(range)
  }
}
