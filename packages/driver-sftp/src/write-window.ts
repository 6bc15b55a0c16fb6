import { abortError, readUpload, type UploadBody } from '@varve/core'
import type { SftpConnection } from './connection.ts'
import { sync } from './remote-file.ts'

/**
 * Bytes written and not yet acknowledged. More than the 2 MiB that OpenSSH lets into a channel, so that a channel is
 * never empty while acknowledgements are on their way.
 */
const WINDOW = 4 * 1024 * 1024
/** What a request takes of the window at least, so that small chunks cannot make endlessly many. */
const LEAST_WEIGHT = 2048
/** After so many bytes the server is asked to make them durable, so that a resumed upload can build on them. */
const SYNC_BYTES = 8 * 1024 * 1024
/** Making durable may take this part of an upload's time. */
const SYNC_SHARE = 0.1

/** Options of {@link writeWindow}. */
export interface WriteWindowOptions {
  /** The key that is uploaded, for messages. */
  key: string
  /** The position in the body, and in the file, to begin at. More than 0 only for a replayable body of known size. */
  start: number
  signal?: AbortSignal | undefined
  /** Called with the position before which everything is written. */
  onWritten: (position: number) => void
  /** Called with the position before which everything stays, whatever happens to the server. */
  onKept: (position: number) => void
}

/** A chunk of a body, which is given back when all of it is written. */
interface Lent {
  readonly chunk: Uint8Array
  /** The same memory. */
  readonly bytes: Buffer
  unwritten: number
}

/** A write that is under way, or acknowledged before one in front of it. */
interface Request {
  /** The position behind it. */
  readonly end: number
  readonly lent: Lent
  readonly length: number
  done: boolean
}

/**
 * Writes a body into an open file by many positioned writes under way at once and returns its length. When it returns
 * or throws, no write is under way any more.
 */
export async function writeWindow(
  connection: SftpConnection,
  handle: Buffer,
  body: UploadBody,
  options: WriteWindowOptions,
): Promise<number> {
  const { key, start, signal, onWritten, onKept } = options
  const broken = new AbortController()
  let failure: { error: unknown } | undefined
  let wake: () => void = () => undefined
  let position = start
  let written = start
  let weight = 0
  let requests = 0
  const unacknowledged: Request[] = []
  const durability = new Durability(connection, handle, start, onKept)

  const fail = (error: unknown) => {
    failure ??= { error }
    broken.abort(error)
    wake()
  }
  const giveUp = () => signal && fail(abortError(signal))

  function write(lent: Lent, offset: number, length: number): void {
    const request: Request = { end: position + length, done: false, lent, length }
    const requestWeight = Math.max(length, LEAST_WEIGHT)
    const at = position
    position += length
    weight += requestWeight
    requests++
    unacknowledged.push(request)
    connection.send(
      (sftp, done) => sftp.write(handle, lent.bytes, offset, length, at, done),
      error => {
        weight -= requestWeight
        requests--
        request.done = true
        if (error !== undefined) fail(error)
        else if (!failure) acknowledge(request)
        wake()
      },
    )
  }

  function acknowledge({ lent, length }: Request): void {
    const before = written
    while (unacknowledged[0]?.done) written = unacknowledged.shift()?.end ?? written
    lent.unwritten -= length
    try {
      // not sooner: ssh2 may copy a part of a request only later, and its memory is used again at once
      if (lent.unwritten === 0) body.recycle?.(lent.chunk)
      if (written === before) return
      onWritten(written)
    } catch (error) {
      fail(error) // not to be thrown at ssh2, which is calling
      return
    }
    durability.advance(written).catch(fail)
  }

  async function until(condition: () => boolean): Promise<void> {
    while (!condition()) {
      await new Promise<void>(resolve => {
        wake = resolve
      })
    }
  }

  signal?.addEventListener('abort', giveUp, { once: true })
  try {
    if (start === 0 || start !== body.size) {
      const range = start > 0 ? { start, end: sizeOf(body) } : undefined
      for await (const chunk of readUpload(body, { key, signal: broken.signal, ...(range && { range }) })) {
        const { byteLength } = chunk
        const bytes = Buffer.from(chunk.buffer, chunk.byteOffset, byteLength)
        const lent = { chunk, bytes, unwritten: byteLength }
        for (let offset = 0; offset < byteLength && !failure; ) {
          const length = Math.min(connection.packetSize, byteLength - offset)
          await until(() => weight < WINDOW || failure !== undefined)
          if (failure) break
          write(lent, offset, length)
          offset += length
        }
        if (failure) break
        if (byteLength === 0) body.recycle?.(chunk)
      }
    }
  } catch (error) {
    failure ??= { error }
  }
  try {
    await until(() => requests === 0)
    await durability.settled()
  } catch (error) {
    failure ??= { error }
  } finally {
    signal?.removeEventListener('abort', giveUp)
  }
  if (failure) throw failure.error
  return position
}

function sizeOf({ size }: UploadBody): number {
  if (size === undefined) throw new TypeError('A body of unknown size is written from its beginning.')
  return size
}

/**
 * Asks the server now and then to make durable what is written (`fsync@openssh.com`). Where it cannot, nothing counts as
 * kept.
 */
class Durability {
  readonly #connection: SftpConnection
  readonly #handle: Buffer
  readonly #onKept: (position: number) => void
  #kept: number
  #offered = true
  #running: Promise<void> | undefined
  #notBefore = 0

  constructor(connection: SftpConnection, handle: Buffer, start: number, onKept: (position: number) => void) {
    this.#connection = connection
    this.#handle = handle
    this.#kept = start
    this.#onKept = onKept
  }

  /** Everything before `position` is written. */
  async advance(position: number): Promise<void> {
    if (!this.#offered || this.#running) return
    if (position - this.#kept < SYNC_BYTES || performance.now() < this.#notBefore) return
    this.#running = this.#sync(position).finally(() => {
      this.#running = undefined
    })
    await this.#running
  }

  async settled(): Promise<void> {
    await this.#running
  }

  async #sync(position: number): Promise<void> {
    const began = performance.now()
    this.#offered = await sync(this.#connection, this.#handle)
    if (!this.#offered) return // a server that lost power and came back looks like one whose connection was cut
    const ended = performance.now()
    this.#notBefore = ended + (ended - began) * (1 / SYNC_SHARE - 1)
    this.#kept = position
    this.#onKept(position)
  }
}
