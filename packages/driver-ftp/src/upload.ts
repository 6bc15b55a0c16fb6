import { randomBytes } from 'node:crypto'
import {
  abortError,
  isVarveError,
  type PutOptions,
  type StoredObject,
  TEMPORARY_PREFIX,
  type UploadBody,
  VarveError,
} from '@varve/core'
import { backOff } from './back-off.ts'
import type { FtpConnection } from './connection.ts'
import type { ConnectionPool, ConnectionUse } from './connection-pool.ts'
import { type FoldersInUse, isFolder, makeFolders, removeEmptyFolders } from './folders.ts'
import { deniedError, ftpError, isRefusal, isReply, replyText } from './ftp-error.ts'
import type { FtpSettings } from './ftp-options.ts'
import { expectRoot, pauseAfter, REFUSALS, sizeOf } from './place.ts'
import { sendFile } from './send-file.ts'
import { Transfer } from './transfer.ts'
import { UploadCursor } from './upload-cursor.ts'

/** How long an upload that was given up may take to tidy up, in milliseconds, if the server may be silent for longer. */
const GRACE_MS = 5_000
/** How often a folder may vanish between its making and the first file in it. */
const ROUNDS = 100
/**
 * So many bytes at most, of a known size and no stream that may stall, are sent on the connection that is left to commands: as
 * many as the list of blocks of 2 TiB has. What a backup stores beside its images must not wait for the images of others, as
 * its guest is on an overlay by then.
 */
const SHORT_BYTES = 16 * 1024 * 1024

/** What an upload needs of its driver. */
export interface UploadContext {
  readonly pool: ConnectionPool
  readonly settings: FtpSettings
  readonly foldersInUse: FoldersInUse
}

/**
 * Stores one object: under a temporary name, then, once the server holds as many bytes as were sent, its own.
 *
 * A command whose reply was lost may be carried out at any time later. A late `STOR` would cut off the file that another
 * attempt writes by then, and leave zeros in it, unseen: so no file is begun twice, nor continued while a `STOR` to it has
 * no reply.
 */
export class Upload {
  readonly #context: UploadContext
  readonly #key: string
  readonly #body: UploadBody
  readonly #options: PutOptions
  readonly #cursor: UploadCursor
  readonly #use: ConnectionUse
  readonly #names: readonly string[]
  readonly #folders: readonly string[]
  /** The file that is written, by its temporary name. */
  #part: readonly string[]
  /** Whether a `STOR` to it was sent and has no reply. */
  #uncertain = false
  /** All files that were begun and may be on the server. */
  readonly #parts = new Set<readonly string[]>()
  /** Whether any was begun. */
  #begun = false
  /** The file that may have the object's name by now. */
  #renamed: { readonly part: readonly string[]; readonly size: number } | undefined
  /** Whether the server was asked to remove that file. */
  #removalAsked = false
  /** Whether the server lets a file be continued. */
  #resumes = true
  /** The most that the server was ever seen to hold. */
  #confirmed = 0
  #failures = 0

  constructor(context: UploadContext, key: string, body: UploadBody, options: PutOptions) {
    this.#context = context
    this.#key = key
    this.#body = body
    this.#options = options
    this.#cursor = new UploadCursor(body, key, options.signal)
    const { replayable, size = Number.POSITIVE_INFINITY } = body
    this.#use = replayable && size <= SHORT_BYTES ? 'command' : 'upload'
    this.#names = key.split('/')
    this.#folders = this.#names.slice(0, -1)
    this.#part = this.#newPart()
  }

  #newPart(): readonly string[] {
    return [...this.#folders, TEMPORARY_PREFIX + randomBytes(8).toString('hex')]
  }

  /** Does it all, once. Nothing is left when it throws. */
  async run(): Promise<StoredObject> {
    const { foldersInUse } = this.#context
    const letGo = foldersInUse.keep(this.#folders)
    let kept = true
    using cursor = this.#cursor
    try {
      await this.#tryAgain()
      return { key: this.#key, size: cursor.position }
    } catch (error) {
      letGo()
      kept = false
      return await this.#discarded(ftpError(error, `Writing ${this.#key}`, this.#context.settings))
    } finally {
      if (kept) letGo()
    }
  }

  async #tryAgain(): Promise<void> {
    const { signal } = this.#options
    const { pool, settings } = this.#context
    const { closing } = pool
    for (;;) {
      try {
        const connection = await pool.acquire(this.#use, { signal })
        try {
          return await this.#withGrace(connection, () => this.#attempt(connection))
        } finally {
          pool.release(connection)
        }
      } catch (error) {
        if (signal?.aborted) throw abortError(signal)
        if (this.#cursor.failure) throw this.#cursor.failure.error
        if (closing.aborted) throw abortError(closing)
        const failure = ftpError(error, `Writing ${this.#key}`, settings)
        if (!failure.retryable || ++this.#failures >= settings.attempts) throw failure
        await backOff(this.#failures, signal)
      }
    }
  }

  /** Lets an upload that is given up come to an orderly end, but not for long. */
  async #withGrace(connection: FtpConnection, work: () => Promise<void>): Promise<void> {
    const { signal } = this.#options
    const graceMs = Math.min(GRACE_MS, this.#context.settings.timeoutMs)
    let timer: NodeJS.Timeout | undefined
    const onAbort = () => {
      timer = setTimeout(() => connection.close(), graceMs)
    }
    signal?.addEventListener('abort', onAbort, { once: true })
    try {
      await work()
    } catch (error) {
      if (isReply(error, 421)) connection.close() // the server is about to do so
      throw error
    } finally {
      signal?.removeEventListener('abort', onAbort)
      clearTimeout(timer)
    }
  }

  async #attempt(connection: FtpConnection): Promise<void> {
    if (this.#removalAsked || !(await this.#isPublished(connection))) {
      const cursor = this.#cursor
      const offset = this.#begun ? await this.#resumeAt(connection) : 0
      const complete = cursor.ended && cursor.position === offset && offset > 0
      if (!complete) await this.#send(connection, offset)
      await this.#publish(connection)
    }
    // what stays of former attempts is no object, and goes with the next clean-up
    await this.#removeParts(connection).catch(() => undefined)
  }

  /** Where to go on after a broken transfer: the cursor is there when this returns. */
  async #resumeAt(connection: FtpConnection): Promise<number> {
    const cursor = this.#cursor
    const stored = this.#uncertain ? 0 : ((await sizeOf(connection, connection.pathOf(this.#part))) ?? 0)
    if (stored > this.#confirmed && stored <= cursor.position) {
      this.#confirmed = stored
      this.#failures = 0
    }
    const resumes = this.#resumes && connection.features.get('REST') === 'STREAM' // RFC 3659, 5.1
    // nothing was lost, as when the server gave up waiting for the source: even a stream can go on
    if (stored === cursor.position && (resumes || cursor.ended || stored === 0)) return stored
    if (resumes && cursor.seekable && stored < cursor.position) {
      cursor.seek(stored)
      return stored
    }
    if (!cursor.replayable) {
      throw new VarveError(
        'UPLOAD_FAILED',
        `The connection to ${this.#context.settings.location} was lost while ${this.#key} was written, and its source cannot be read again. Check the network, and upload it again.`,
        { context: { key: this.#key, stored, sent: cursor.position } },
      )
    }
    cursor.seek(0)
    return 0
  }

  async #send(connection: FtpConnection, offset: number): Promise<void> {
    const { signal, onProgress } = this.#options
    const transfer = offset > 0 ? await this.#resume(connection, offset) : await this.#create(connection)
    try {
      await sendFile(transfer, connection, this.#cursor, {
        recycle: chunk => this.#body.recycle?.(chunk),
        ...(signal && { signal }),
        ...(onProgress && { onProgress }),
      })
    } catch (error) {
      const said = await transfer.abandon()
      const isOwn = this.#cursor.failure || signal?.aborted || isVarveError(error, 'UPLOAD_FAILED')
      throw isOwn ? error : (said ?? error)
    }
  }

  async #resume(connection: FtpConnection, offset: number): Promise<Transfer> {
    try {
      return await this.#begin(connection, offset)
    } catch (error) {
      if (!isReply(error) || isReply(error, 421, 425)) throw error
      this.#resumes = false
      connection.close() // it may still be about to continue the file
      throw new VarveError(
        'STORAGE_FAILED',
        `The server does not continue an upload: ${replyText(error, this.#context.settings)}. Check the network, and upload it again.`,
        { cause: error, retryable: true },
      )
    }
  }

  async #begin(connection: FtpConnection, offset: number): Promise<Transfer> {
    const onSend = () => {
      this.#uncertain = true
    }
    try {
      const path = connection.pathOf(this.#part)
      const transfer = await Transfer.begin(connection, `STOR ${path}`, { offset, onSend })
      this.#uncertain = false
      return transfer
    } catch (error) {
      if (isReply(error)) this.#uncertain = false
      throw error
    }
  }

  /** Begins a file that was not begun before, and makes the folders that it needs. */
  async #create(connection: FtpConnection): Promise<Transfer> {
    if (this.#begun) {
      await this.#removeParts(connection).catch(error => {
        if (!isRefusal(error)) throw error // it may be in use by the broken connection
      })
      this.#part = this.#newPart()
      this.#uncertain = false
    }
    const folder = this.#folders
    let refusal: unknown = new Error(`the folder ${connection.pathOf(folder)} cannot be made or entered`)
    for (let refusals = 0, round = 1; refusals < REFUSALS && round <= ROUNDS; round++) {
      const isThere = folder.length === 0 || (await isFolder(connection, folder))
      this.#begun = true
      this.#parts.add(this.#part)
      if (isThere) {
        try {
          return await this.#begin(connection, 0)
        } catch (error) {
          if (!isRefusal(error)) throw error
          refusal = error
        }
      }
      // whoever deletes the last object of a folder removes the folder; make it again
      const made = !isThere && (await makeFolders(connection, folder))
      refusals = made ? 0 : refusals + 1
      if (refusals > 0) await pauseAfter(refusals)
    }
    await expectRoot(connection)
    throw deniedError(refusal, `Writing ${this.#key}`, this.#context.settings)
  }

  async #publish(connection: FtpConnection): Promise<void> {
    const { settings } = this.#context
    const size = this.#cursor.position
    const part = this.#part
    const stored = await sizeOf(connection, connection.pathOf(part))
    if (stored !== size) {
      throw new VarveError(
        'STORAGE_FAILED',
        `${size} bytes of ${this.#key} were sent, but ${settings.location} holds ${stored ?? 'none'}. Check the server and its disk.`,
        { context: { key: this.#key, size, stored }, retryable: true },
      )
    }
    if (this.#options.signal?.aborted) throw abortError(this.#options.signal)
    try {
      await connection.command(`RNFR ${connection.pathOf(part)}`)
      this.#renamed = { part, size }
      this.#removalAsked = false
      await connection.command(`RNTO ${connection.pathOf(this.#names)}`)
      this.#parts.delete(part)
    } catch (error) {
      if (!isRefusal(error)) throw error
      const failure = ftpError(error, `Giving ${this.#key} its name`, settings)
      const { message, context } = failure
      throw failure.code !== 'STORAGE_FAILED'
        ? failure
        : new VarveError(
            'STORAGE_FAILED',
            `${message} The user must be allowed to rename and replace files; a folder of that name may be in the way.`,
            { context, cause: error },
          )
    }
  }

  /** Whether a rename whose reply was lost has come about. Nobody else knows the temporary name. */
  async #isPublished(connection: FtpConnection): Promise<boolean> {
    if (this.#renamed === undefined) return false
    const { part, size } = this.#renamed
    if ((await sizeOf(connection, connection.pathOf(part))) !== undefined) return false
    return (await sizeOf(connection, connection.pathOf(this.#names))) === size
  }

  /**
   * Removes what there is on the server and throws `failure`, which tells if something stays; or returns the object that
   * is stored all the same.
   */
  async #discarded(failure: VarveError): Promise<StoredObject> {
    if (!this.#begun) throw failure
    const { pool, settings } = this.#context
    // a server that was silent mostly stays so; else a new connection may take longer than one answer
    const graceMs = failure.code === 'TIMEOUT' ? Math.min(GRACE_MS, settings.timeoutMs) : GRACE_MS
    const timeout = AbortSignal.timeout(graceMs)
    for (let failures = 1; ; failures++) {
      try {
        const size = await pool.use('command', timeout, connection => this.#discard(connection))
        if (size !== undefined) return { key: this.#key, size }
        break
      } catch (error) {
        const left = ftpError(error, 'Removing what was written so far', settings)
        if (left.retryable && !timeout.aborted && failures < settings.attempts) {
          await backOff(failures, undefined)
          continue
        }
        const { code, message, context, cause, retryable } = failure
        const unknown =
          this.#renamed === undefined
            ? ''
            : ` Whether ${this.#key} is stored all the same is not known: look for it, or write it again.`
        const names = [...this.#parts].map(part => part.join('/')).join(', ')
        throw new VarveError(
          code,
          `${message}${unknown} An unfinished upload may be left as ${names}, until the storage is cleaned up: ${left.message}`,
          { context, cause, retryable },
        )
      }
    }
    throw failure
  }

  /** Removes what there is on the server, or returns the size of the object that is stored all the same. */
  async #discard(connection: FtpConnection): Promise<number | undefined> {
    const asked = this.#removalAsked
    await this.#removeParts(connection)
    const size = this.#renamed?.size
    if (size !== undefined && (await this.#isPublished(connection))) {
      // a removal whose reply was lost may be why the file is gone, and the object that of somebody else
      if (!asked) return size
      throw new VarveError('STORAGE_FAILED', 'the server does not say whether it was renamed or removed.')
    }
    const { foldersInUse } = this.#context
    await removeEmptyFolders(connection, this.#folders, names => foldersInUse.isFree(names))
    return undefined
  }

  /** Removes what is there of files that were begun. One that is not may still come, by a command that is late. */
  async #removeParts(connection: FtpConnection): Promise<void> {
    for (const part of this.#parts) {
      const renamed = part === this.#renamed?.part
      if (renamed) this.#removalAsked = true
      const removed = await removeFile(connection, connection.pathOf(part))
      if (!removed || (part === this.#part && this.#uncertain)) continue
      this.#parts.delete(part)
      if (renamed) this.#renamed = undefined
    }
  }
}

/** Removes a file; false where it is not there. */
async function removeFile(connection: FtpConnection, path: string): Promise<boolean> {
  try {
    await connection.command(`DELE ${path}`)
    return true
  } catch (error) {
    if (!isRefusal(error) || (await sizeOf(connection, path)) !== undefined) throw error
    return false
  }
}
