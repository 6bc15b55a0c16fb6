import { Readable } from 'node:stream'
import { type ByteRange, destroyOnAbort, isVarveError, type ObjectStream, VarveError } from '@varve/core'
import { close } from './remote-file.ts'
import type { Lease } from './session.ts'
import { isLost, isStatus, STATUS, sftpError } from './sftp-error.ts'

/** Bytes asked for ahead of the consumer: what an SSH channel of ssh2 lets the server send. */
const WINDOW = 2 * 1024 * 1024

/** An open object of a storage. */
export interface OpenObject {
  readonly lease: Lease
  readonly handle: Buffer
  readonly size: number
  /** When it was last written, in seconds. */
  readonly mtime: number
}

/** Options of {@link SftpStream}. */
export interface SftpStreamOptions {
  /** The key, for messages. */
  key: string
  /** Within the object. */
  range: ByteRange
  /** Opens the object again after the nth failure in a row, once it has waited; throws where it should not. */
  reopen: (error: VarveError, failures: number) => Promise<OpenObject>
  signal?: AbortSignal | undefined
}

/** A read that is under way, or whose bytes wait for those before them. */
interface Slot {
  readonly memory: Buffer
  readonly position: number
  readonly length: number
  filled: number
}

/**
 * The bytes of an open object as a stream, by many positioned reads under way at once. It owns the object from here on,
 * goes on on a new connection where one broke, and fails when the object ends before the range does.
 */
export class SftpStream extends Readable implements ObjectStream {
  readonly #options: SftpStreamOptions
  readonly #slots: Slot[] = []
  readonly #lent = new WeakSet<ArrayBufferLike>()
  readonly #free: Buffer[] = []
  #object: OpenObject
  #packetSize: number
  #next: number
  #delivered: number
  #requests = 0
  #failures = 0
  #wanted = false
  #reopening = false

  constructor(object: OpenObject, options: SftpStreamOptions) {
    super({ highWaterMark: 1 }) // no chunks wait to be joined, which copies: the slots are the buffer
    this.#object = object
    this.#options = options
    this.#packetSize = object.lease.root.connection.packetSize
    this.#next = options.range.start
    this.#delivered = options.range.start
    destroyOnAbort(this, options.signal)
  }

  override _read(): void {
    this.#wanted = true
    this.#advance()
  }

  recycle(chunk: Uint8Array): void {
    const { buffer } = chunk
    if (!this.#lent.delete(buffer)) return // not ours, or given back before
    if (buffer.byteLength === this.#packetSize) this.#free.push(Buffer.from(buffer))
  }

  override _destroy(error: Error | null, done: (error?: Error | null) => void): void {
    this.#closeWhenQuiet()
    done(error)
  }

  /** Asks for more and hands on what has come, in order. */
  #advance(): void {
    if (this.destroyed || this.#reopening) return
    const { end } = this.#options.range
    const room = () => this.#next < end && this.#next - this.#delivered < WINDOW
    while (room()) this.#ask(Math.min(this.#packetSize, end - this.#next))
    while (this.#wanted) {
      const [slot] = this.#slots
      if (slot === undefined && this.#delivered >= end) {
        this.#wanted = false
        this.push(null)
        return
      }
      if (slot === undefined || slot.filled < slot.length) return
      this.#slots.shift()
      this.#delivered += slot.length
      this.#lent.add(slot.memory.buffer)
      this.#wanted = false
      if (this.push(slot.memory.subarray(0, slot.length))) this.#wanted = true
      while (room()) this.#ask(Math.min(this.#packetSize, end - this.#next))
    }
  }

  #ask(length: number): void {
    const memory = this.#free.pop() ?? Buffer.allocUnsafeSlow(this.#packetSize)
    const slot = { memory, position: this.#next, length, filled: 0 }
    this.#slots.push(slot)
    this.#next += length
    this.#request(slot)
  }

  #request(slot: Slot): void {
    const object = this.#object
    const { memory, position, length, filled } = slot
    this.#requests++
    object.lease.root.connection.send<number>(
      (sftp, done) => sftp.read(object.handle, memory, filled, length - filled, position + filled, done),
      (error, bytes) => {
        this.#requests--
        if (this.destroyed) this.#closeWhenQuiet()
        else if (error !== undefined) this.#failed(error)
        else if (bytes === 0) this.#failed(Object.assign(new Error('End of file'), { code: STATUS.EOF }))
        else {
          slot.filled += bytes
          this.#failures = 0
          if (slot.filled < slot.length) this.#request(slot)
          else if (!this.#reopening) this.#advance()
        }
      },
    )
  }

  #failed(error: unknown): void {
    if (this.destroyed || this.#reopening) return
    if (isLost(error)) {
      this.#reopening = true
      this.#reopen(error).catch(failure => this.destroy(failure))
    } else if (isStatus(error, STATUS.EOF)) this.destroy(this.#changed('it has become shorter'))
    else this.destroy(isVarveError(error) ? error : sftpError(error, 'Reading', this.#options.key))
  }

  async #reopen(error: VarveError): Promise<void> {
    const former = this.#object
    former.lease[Symbol.dispose]() // its handle went with its connection
    const object = await this.#options.reopen(error, ++this.#failures)
    if (this.destroyed) return release(object)
    this.#object = object
    this.#reopening = false
    if (object.size !== former.size || object.mtime !== former.mtime) throw this.#changed('it is another one')
    for (const slot of this.#slots) if (slot.filled < slot.length) this.#request(slot)
    this.#advance()
  }

  #changed(how: string): VarveError {
    const { key, range } = this.#options
    return new VarveError(
      'STORAGE_FAILED',
      `${key} was changed on the storage while it was read: ${how} than at the beginning. Read it again.`,
      { context: { key, position: this.#delivered, end: range.end } },
    )
  }

  /** A handle is closed when no request for it is under way. */
  #closeWhenQuiet(): void {
    if (this.#requests === 0 && !this.#reopening) release(this.#object)
  }
}

/** Closes an object. Not awaited: a silent server never answers, and closing what was only read tells nothing of the bytes. */
function release({ lease, handle }: OpenObject): void {
  close(lease.root.connection, handle)
    .catch(() => undefined)
    .finally(() => lease[Symbol.dispose]())
}
