import { randomUUID } from 'node:crypto'
import { once } from 'node:events'
import { connect, type Socket } from 'node:net'
import { Readable } from 'node:stream'
import {
  abortError,
  assertKey,
  assertRange,
  type CallOptions,
  type CleanUpOptions,
  checkStorage,
  errorMessage,
  failsWithProgress,
  type GetOptions,
  isVarveError,
  type PutOptions,
  readUpload,
  type StorageDriver,
  type StorageHealth,
  type StoredObject,
  toUploadBody,
  type UploadBody,
  VarveError,
} from '@varve/core'
import { frame, frames, message } from './toy-frames.ts'
import type { ToyRequest } from './toy-server.ts'

const ATTEMPTS = 3

/** Options of {@link ToyDriver}. */
export interface ToyDriverOptions {
  port: number
  space: string
  password: string
  /** How long the server may be silent while something is expected of it. */
  timeoutMs: number
}

interface ToyReply {
  error?: string
  object?: { key: string; id: string; size: number; modifiedAt: number }
  removed?: number
}

/** A driver of the toy server, with a connection for each call. */
export class ToyDriver implements StorageDriver {
  readonly type = 'toy'
  readonly location: string
  readonly capabilities = { rangeRead: true, atomicPublish: true, resume: false, parallelParts: false }
  readonly #options: ToyDriverOptions

  constructor(options: ToyDriverOptions) {
    this.#options = options
    this.location = `toy://127.0.0.1:${options.port}/${options.space}`
  }

  async put(key: string, body: UploadBody | Readable, options: PutOptions = {}): Promise<StoredObject> {
    try {
      assertKey(key)
      const upload = toUploadBody(body)
      const attempts = upload.replayable ? ATTEMPTS : 1
      await failsWithProgress(options, guarded =>
        retry(attempts, options, () => this.#upload(key, upload, guarded)),
      )
      const object = await this.stat(key, options)
      if (object) return object
      throw new VarveError('STORAGE_FAILED', `The object ${key} is gone.`)
    } finally {
      if (body instanceof Readable) body.destroy()
    }
  }

  async get(key: string, { range, signal }: GetOptions = {}): Promise<Readable> {
    assertKey(key)
    if (range) assertRange(range)
    const asked = await retry(ATTEMPTS, { signal }, async () => {
      const connection = this.#ask({ op: 'get', key, ...(range && { range }) }, signal)
      const reply = await connection.reply()
      if (reply.error === undefined) return connection
      throw new VarveError('OBJECT_NOT_FOUND', `There is no object ${key}.`)
    })
    const stream = Readable.from(asked.chunks(), { objectMode: false })
    const giveUp = () => signal && stream.destroy(abortError(signal))
    signal?.addEventListener('abort', giveUp, { once: true })
    return stream.once('close', () => {
      signal?.removeEventListener('abort', giveUp)
      asked.close()
    })
  }

  async stat(key: string, { signal }: CallOptions = {}): Promise<StoredObject | undefined> {
    assertKey(key)
    const { object } = await this.#request({ op: 'stat', key }, signal)
    return object && { key, size: object.size, modifiedAt: new Date(object.modifiedAt) }
  }

  async *list(prefix: string, { signal }: CallOptions = {}): AsyncGenerator<StoredObject> {
    assertKey(prefix, 'prefix')
    const connection = await retry(ATTEMPTS, { signal }, async () => {
      const asked = this.#ask({ op: 'list', key: prefix }, signal)
      await asked.reply()
      return asked
    })
    for await (const line of connection.chunks()) {
      if (signal?.aborted) throw abortError(signal)
      const { key, size, modifiedAt } = JSON.parse(line.toString())
      yield { key, size, modifiedAt: new Date(modifiedAt) }
    }
  }

  async delete(key: string, { signal }: CallOptions = {}): Promise<void> {
    assertKey(key)
    await this.#request({ op: 'delete', key }, signal)
  }

  async check(options: CallOptions = {}): Promise<StorageHealth> {
    const connect = async () => {
      await this.#request({ op: 'hello' }, options.signal)
      return {}
    }
    return checkStorage(this, { ...options, connect })
  }

  async cleanUp({ olderThan, signal }: CleanUpOptions): Promise<number> {
    const { removed } = await this.#request({ op: 'cleanUp', olderThan: olderThan.getTime() }, signal)
    return removed ?? 0
  }

  async [Symbol.asyncDispose](): Promise<void> {
    // each call has ended its own connection
  }

  async #upload(key: string, upload: UploadBody, options: PutOptions): Promise<void> {
    const id = randomUUID()
    const connection = this.#ask({ op: 'put', key, id }, options.signal)
    try {
      let size = 0
      for await (const chunk of readUpload(upload, { ...options, key })) {
        await connection.send(frame(chunk))
        size += chunk.byteLength
        upload.recycle?.(chunk)
        options.onProgress?.(size)
      }
      await connection.send(frame(''))
      await connection.reply()
    } catch (error) {
      connection.close()
      // the answer may have got lost
      const stored = await this.#request({ op: 'stat', key }).catch(() => undefined)
      if (stored?.object?.id === id && !options.signal?.aborted) return
      await this.#request({ op: 'drop', id }).catch(() => undefined) // left to cleanUp
      throw error
    } finally {
      connection.close()
    }
  }

  async #request(request: Partial<ToyRequest>, signal?: AbortSignal): Promise<ToyReply> {
    return retry(ATTEMPTS, { signal }, async () => {
      const connection = this.#ask(request, signal)
      try {
        return await connection.reply()
      } finally {
        connection.close()
      }
    })
  }

  #ask(request: Partial<ToyRequest>, signal?: AbortSignal): ToyConnection {
    const { space, password, port, timeoutMs } = this.#options
    const connection = new ToyConnection(connect({ port, host: '127.0.0.1' }), timeoutMs, signal)
    connection.send(message({ key: '', ...request, space, password })).catch(() => undefined) // told by what follows
    return connection
  }
}

/** Ends with an error when the server is silent for too long, or the call is given up. */
class ToyConnection {
  readonly #socket: Socket
  readonly #incoming: AsyncGenerator<Buffer, undefined>
  readonly #timeoutMs: number

  constructor(socket: Socket, timeoutMs: number, signal?: AbortSignal) {
    this.#socket = socket.on('error', () => undefined)
    this.#timeoutMs = timeoutMs
    this.#incoming = frames(socket)
    const giveUp = () => signal && socket.destroy(abortError(signal))
    if (signal?.aborted) giveUp()
    signal?.addEventListener('abort', giveUp, { once: true })
    socket.once('close', () => signal?.removeEventListener('abort', giveUp))
  }

  async send(bytes: Buffer): Promise<void> {
    if (this.#socket.destroyed) throw toyError(this.#socket.errored)
    if (!this.#socket.write(bytes)) await this.#expect(once(this.#socket, 'drain'))
  }

  async reply(): Promise<ToyReply> {
    const reply: ToyReply = JSON.parse((await this.#next()).toString())
    if (reply.error === 'denied') throw new VarveError('STORAGE_ACCESS_DENIED', 'The password is wrong.')
    if (reply.error === 'missing') throw new VarveError('STORAGE_NOT_FOUND', 'There is no such space.')
    return reply
  }

  async *chunks(): AsyncGenerator<Buffer> {
    try {
      for (let chunk = await this.#next(); chunk.length > 0; chunk = await this.#next()) yield chunk
    } finally {
      this.close()
    }
  }

  close(): void {
    this.#socket.destroy()
  }

  async #next(): Promise<Buffer> {
    const { value } = await this.#expect(this.#incoming.next())
    if (value === undefined) throw toyError(new Error('the connection ended'))
    return value
  }

  async #expect<T>(event: Promise<T>): Promise<T> {
    const silent = () => this.#socket.destroy(new VarveError('TIMEOUT', 'The server is silent.'))
    const timer = setTimeout(silent, this.#timeoutMs)
    try {
      return await event
    } catch (error) {
      throw toyError(this.#socket.errored ?? error)
    } finally {
      clearTimeout(timer)
    }
  }
}

function toyError(error: unknown): VarveError {
  if (isVarveError(error)) return error
  const message = `The server cannot be reached: ${errorMessage(error)}.`
  return new VarveError('STORAGE_UNREACHABLE', message, { cause: error, retryable: true })
}

async function retry<T>(
  attempts: number,
  { signal }: { signal?: AbortSignal | undefined },
  attempt: () => Promise<T>,
): Promise<T> {
  for (let left = attempts - 1; ; left--) {
    if (signal?.aborted) throw abortError(signal)
    try {
      return await attempt()
    } catch (error) {
      if (left <= 0 || !isVarveError(error, 'STORAGE_UNREACHABLE')) throw error
    }
  }
}
