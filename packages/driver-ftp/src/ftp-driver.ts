import { Readable } from 'node:stream'
import { buffer } from 'node:stream/consumers'
import {
  abortError,
  assertKey,
  assertRange,
  type CallOptions,
  type CleanUpOptions,
  checkStorage,
  type DriverCapabilities,
  destroyOnAbort,
  failsWithProgress,
  type GetOptions,
  isKey,
  objectNotFound,
  type PutOptions,
  removeEach,
  type StorageDriver,
  type StorageHealth,
  type StoredObject,
  TEMPORARY_PREFIX,
  toUploadBody,
  type UploadBody,
} from '@varve/core'
import { backOff } from './back-off.ts'
import { FtpConnection } from './connection.ts'
import { ConnectionPool, type ConnectionUse } from './connection-pool.ts'
import { Download } from './download.ts'
import { FoldersInUse, removeEmptyFolders } from './folders.ts'
import { ftpError, isRefusal } from './ftp-error.ts'
import { checkOptions, type FtpDriverOptions, type FtpSettings } from './ftp-options.ts'
import { listFolder } from './list-folder.ts'
import { askSize, askTime, unlessMissing } from './place.ts'
import { Transfer } from './transfer.ts'
import { Upload } from './upload.ts'

/**
 * A range of so many bytes at most is read at once, on the connection that is left to commands: what a manifest or a
 * look into an image takes must not wait for uploads of hours.
 */
const SHORT_BYTES = 1024 * 1024

/**
 * Keeps backups on an FTP server, with TLS unless told otherwise. Passive mode only.
 *
 * An object is written under a temporary name beside its place, its size on the server compared with what was sent,
 * and then renamed. Folders are made as they are needed and removed when they are empty. A few connections are kept
 * for a while and shared by all calls.
 *
 * FTP knows no way to make a server write to its disk: an object that is stored may be lost if the server loses
 * power within the next seconds.
 */
export class FtpDriver implements StorageDriver {
  readonly type = 'ftp'
  readonly location: string
  readonly capabilities: DriverCapabilities = {
    rangeRead: true,
    atomicPublish: true,
    resume: true,
    parallelParts: false,
  }
  readonly #settings: FtpSettings
  readonly #pool: ConnectionPool
  readonly #foldersInUse = new FoldersInUse()

  /** @throws INVALID_CONFIG for an option that cannot be right; the server is not asked yet */
  constructor(options: FtpDriverOptions) {
    const settings = checkOptions(options)
    this.#settings = settings
    this.location = settings.location
    this.#pool = new ConnectionPool(settings.connections, signal => FtpConnection.open(settings, signal))
  }

  async put(key: string, body: UploadBody | Readable, options: PutOptions = {}): Promise<StoredObject> {
    // a stream may fail before it is its turn, which must not end the process
    if (body instanceof Readable) body.on('error', () => undefined)
    try {
      assertKey(key)
      if (options.signal?.aborted) throw abortError(options.signal)
      const context = { pool: this.#pool, settings: this.#settings, foldersInUse: this.#foldersInUse }
      const upload = toUploadBody(body)
      return await failsWithProgress(options, guarded => new Upload(context, key, upload, guarded).run())
    } finally {
      if (body instanceof Readable) body.destroy()
    }
  }

  async get(key: string, options: GetOptions = {}): Promise<Readable> {
    const { range, signal, onWait } = options
    assertKey(key)
    if (range) assertRange(range)
    const isShort = range !== undefined && range.end - range.start <= SHORT_BYTES
    let stream: Readable | undefined
    await this.#retrying(`Reading ${key}`, signal, async () => {
      const connection = await this.#pool.acquire(isShort ? 'command' : 'download', { signal, onWait })
      const close = () => connection.close()
      signal?.addEventListener('abort', close, { once: true })
      let opened: Readable | undefined
      try {
        opened = await this.#open(connection, key, options)
      } finally {
        signal?.removeEventListener('abort', close)
        if (!(opened instanceof Download)) this.#pool.release(connection)
      }
      stream = isShort && opened ? await inMemory(opened, options) : opened
    })
    if (signal?.aborted) {
      stream?.destroy()
      throw abortError(signal)
    }
    if (stream) return stream
    throw objectNotFound(key, this.location)
  }

  async stat(key: string, options: CallOptions = {}): Promise<StoredObject | undefined> {
    assertKey(key)
    const doing = `Looking up ${key}`
    const names = key.split('/')
    return this.#command(doing, options.signal, connection =>
      unlessMissing(connection, { names, wanted: 'object', doing }, async () => {
        const path = connection.pathOf(names)
        return toObject(key, await askSize(connection, path), await askTime(connection, path))
      }),
    )
  }

  async *list(prefix: string, options: CallOptions = {}): AsyncGenerator<StoredObject> {
    assertKey(prefix, 'prefix')
    yield* this.#walk(prefix, key => isKey(key) && key.startsWith(prefix), options.signal)
  }

  async delete(key: string, options: CallOptions = {}): Promise<void> {
    assertKey(key)
    await this.#command(`Deleting ${key}`, options.signal, connection => this.#remove(connection, key))
  }

  async check(options: CallOptions = {}): Promise<StorageHealth> {
    const connect = async () => {
      await this.#command('Connecting', options.signal, connection => connection.command('NOOP'))
      return {}
    }
    return checkStorage(this, { ...options, connect })
  }

  /** Removes the temporary files that killed processes left of their uploads. */
  async cleanUp({ olderThan, signal }: CleanUpOptions): Promise<number> {
    const isTemporary = (key: string) => (key.split('/').at(-1) ?? '').startsWith(TEMPORARY_PREFIX)
    return removeEach(this.#walk('', isTemporary, signal), async ({ key, modifiedAt }) => {
      if (modifiedAt === undefined || modifiedAt >= olderThan) return false
      await this.#command(`Deleting ${key}`, signal, connection => this.#remove(connection, key))
      return true
    })
  }

  /** Closes all connections. What is under way, or waits for a connection, fails; a later call connects anew. */
  async [Symbol.asyncDispose](): Promise<void> {
    this.#pool.close()
  }

  /** Does something that may be done twice, on a connection that ends with the signal. */
  async #command<T>(
    doing: string,
    signal: AbortSignal | undefined,
    work: (connection: FtpConnection) => Promise<T>,
    use: ConnectionUse = 'command',
  ): Promise<T> {
    return this.#retrying(doing, signal, () => this.#pool.use(use, signal, work))
  }

  async #retrying<T>(doing: string, signal: AbortSignal | undefined, work: () => Promise<T>): Promise<T> {
    const { closing } = this.#pool
    for (let failures = 1; ; failures++) {
      try {
        return await work()
      } catch (error) {
        if (signal?.aborted) throw abortError(signal)
        if (closing.aborted) throw abortError(closing)
        const failure = ftpError(error, doing, this.#settings)
        if (!failure.retryable || failures >= this.#settings.attempts) throw failure
        await backOff(failures, signal)
      }
    }
  }

  async #open(connection: FtpConnection, key: string, options: GetOptions): Promise<Readable | undefined> {
    const { range, signal } = options
    const names = key.split('/')
    return unlessMissing(connection, { names, wanted: 'object', doing: `Reading ${key}` }, async () => {
      const path = connection.pathOf(names)
      const size = await askSize(connection, path)
      const end = Math.min(range?.end ?? size, size)
      const start = Math.min(range?.start ?? 0, end)
      if (start >= end && size > 0) return Readable.from([])
      return new Download(await Transfer.begin(connection, `RETR ${path}`, { offset: start }), {
        key,
        length: end - start,
        toEnd: end === size,
        settings: this.#settings,
        signal,
        onDone: () => this.#pool.release(connection),
      })
    })
  }

  async #remove(connection: FtpConnection, key: string): Promise<void> {
    const names = key.split('/')
    const path = connection.pathOf(names)
    const done = await unlessMissing(connection, { names, wanted: 'object', doing: `Deleting ${key}` }, () =>
      connection.command(`DELE ${path}`),
    )
    if (!done) return
    await removeEmptyFolders(connection, names.slice(0, -1), folder => this.#foldersInUse.isFree(folder))
  }

  /** The files whose path begins with a prefix, folder by folder. */
  async *#walk(
    prefix: string,
    takes: (key: string) => boolean,
    signal: AbortSignal | undefined,
  ): AsyncGenerator<StoredObject> {
    const first = prefix.split('/').slice(0, -1)
    const waiting: (readonly string[])[] = [first]
    for (let names = waiting.pop(); names !== undefined; names = waiting.pop()) {
      const folder = names
      const found = await this.#command(`Listing ${folder.join('/') || '/'}`, signal, connection =>
        this.#look(connection, folder, takes),
      )
      for (const name of found.folders) {
        const path = [...folder, name].join('/')
        if (isKey(path) && `${path}/`.startsWith(prefix)) waiting.push([...folder, name])
      }
      for (const object of found.objects) {
        if (signal?.aborted) throw abortError(signal)
        yield object
      }
    }
  }

  async #look(
    connection: FtpConnection,
    names: readonly string[],
    takes: (key: string) => boolean,
  ): Promise<{ objects: StoredObject[]; folders: string[] }> {
    const objects: StoredObject[] = []
    const folders: string[] = []
    const look = { names, wanted: 'folder', doing: `Listing ${names.join('/')}` } as const
    const entries = await unlessMissing(connection, look, () =>
      listFolder(connection, connection.pathOf(names)),
    )
    for (const { name, type, size, modifiedAt } of entries ?? []) {
      const path = [...names, name]
      const key = path.join('/')
      if (type === 'folder') folders.push(name)
      if (type !== 'file' || !takes(key)) continue
      // LIST has no more than minutes or days, in a time zone that is not told
      const time = modifiedAt ?? (await this.#timeOf(connection, path))
      if (time !== undefined) objects.push(toObject(key, size, time))
    }
    return { objects, folders }
  }

  /** When an object was written; undefined if it is not there any more. */
  async #timeOf(connection: FtpConnection, names: readonly string[]): Promise<Date | 'unknown' | undefined> {
    try {
      return await askTime(connection, connection.pathOf(names))
    } catch (error) {
      if (isRefusal(error)) return undefined
      throw error
    }
  }
}

/** The bytes of a download once all have come. On a slow line that takes a while, and a silent server ends it. */
async function inMemory(download: Readable, { signal, onWait }: GetOptions): Promise<Readable> {
  onWait?.(true)
  const bytes = await buffer(download).finally(() => onWait?.(false))
  const whole = Readable.from(bytes.length > 0 ? [bytes] : [], { objectMode: false })
  destroyOnAbort(whole, signal)
  return whole
}

function toObject(key: string, size: number, time: Date | 'unknown'): StoredObject {
  return { key, size, ...(time === 'unknown' ? {} : { modifiedAt: time }) }
}
