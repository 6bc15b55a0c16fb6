import { protocolError, serverText } from './errors.ts'
import type { NbdExport } from './handshake.ts'
import type { Operation } from './operation.ts'
import {
  CHUNK,
  CHUNK_DONE,
  CHUNK_ERROR_BIT,
  COMMAND,
  MAGIC_SIMPLE_REPLY,
  MAGIC_STRUCTURED_REPLY,
  MAX_EXTENTS_PER_REPLY,
  MAX_STRING,
} from './protocol.ts'
import type { Request } from './request.ts'
import { describeRequest, serverError } from './server-error.ts'
import { appendStatus, emptyStatus, type StatusExtents } from './status-reply.ts'

/** Who sent the requests that the replies are for. */
export interface ReplyListener {
  /** The outstanding request of a cookie. */
  find(cookie: number): Request | undefined
  /** A reply is whole and valid: the request was done, or the server gave {@link Request.error}. */
  done(cookie: number, request: Request): void
}

/** What comes next: a field of a reply, or the data of a read. */
type Stage = 'magic' | 'chunk' | 'dataOffset' | 'hole' | 'error' | 'context' | 'extent'

/** The longest error chunk: number, length of text, text, offset. */
const MAX_ERROR = 4 + 2 + MAX_STRING + 8
/** A reply may tell of several errors, but not without end. */
const MAX_ERRORS = 16
/** From this many bytes on, the rest of a chunk is received in the caller's memory. */
const DIRECT_MINIMUM = 32 * 1024

/**
 * The replies of the transmission phase, as a state machine over bytes in whatever pieces they arrive.
 *
 * Nothing is believed: a reply must belong to an outstanding request, a chunk must lie inside it, and every
 * byte of a read must arrive exactly once. The parser never allocates what the server merely announces.
 * Throws `NBD_PROTOCOL`; after that it must not be used any more.
 */
export class ReplyParser {
  readonly #export: Pick<NbdExport, 'structuredReplies' | 'metaContexts' | 'blockSize' | 'size'>
  readonly #listener: ReplyListener

  #stage: Stage | 'data' = 'magic'
  /** How many bytes the stage needs at once, and what of them is held in `#held`. */
  #need = 16
  #have = 0
  readonly #held: Buffer = Buffer.allocUnsafeSlow(MAX_ERROR)

  // The chunk that is being received.
  #cookie = 0
  #request: Request | undefined
  #type = 0
  #isLast = false
  #payload = 0
  #extents: StatusExtents = emptyStatus()
  #dataStart = 0
  #dataLeft = 0

  readonly #parse: Readonly<Record<Stage, (bytes: Buffer, at: number) => void>> = {
    magic: (bytes, at) => this.#parseMagic(bytes, at),
    chunk: (bytes, at) => this.#parseChunk(bytes, at),
    dataOffset: (bytes, at) => this.#parseDataOffset(bytes, at),
    hole: (bytes, at) => this.#parseHole(bytes, at),
    error: (bytes, at) => this.#parseError(bytes, at),
    context: (bytes, at) => this.#parseContext(bytes, at),
    extent: (bytes, at) => this.#parseExtent(bytes, at),
  }

  constructor(
    negotiated: Pick<NbdExport, 'structuredReplies' | 'metaContexts' | 'blockSize' | 'size'>,
    listener: ReplyListener,
  ) {
    this.#export = negotiated
    this.#listener = listener
  }

  /** Parses the first `length` bytes of `bytes`. */
  push(bytes: Buffer, length: number): void {
    let at = 0
    while (at < length) {
      const stage = this.#stage
      if (stage === 'data') {
        const count = Math.min(this.#dataLeft, length - at)
        const request = this.#request
        const target = request?.operation.buffer
        if (target) bytes.copy(target, this.#dataStart - request.operation.offset, at, at + count)
        at += count
        this.#advanceData(count)
      } else if (this.#have === 0 && length - at >= this.#need) {
        const start = at
        at += this.#need
        this.#parse[stage](bytes, start)
      } else {
        const count = Math.min(this.#need - this.#have, length - at)
        bytes.copy(this.#held, this.#have, at, at + count)
        at += count
        this.#have += count
        if (this.#have === this.#need) {
          this.#have = 0
          this.#parse[stage](this.#held, 0)
        }
      }
    }
  }

  /**
   * The caller's memory for the bytes that come next, where they are many bytes of a read. After they have been
   * received there, {@link ReplyParser.received} takes the place of {@link ReplyParser.push}.
   */
  directTarget(): { operation: Operation; memory: Uint8Array } | undefined {
    const operation = this.#request?.operation
    if (this.#stage !== 'data' || this.#dataLeft < DIRECT_MINIMUM || !operation?.buffer) return undefined
    const place = this.#dataStart - operation.offset
    return { operation, memory: operation.buffer.subarray(place, place + this.#dataLeft) }
  }

  /** The request whose chunk has begun and not ended. */
  get current(): Request | undefined {
    return this.#request
  }

  /** `count` bytes were received in the memory that {@link ReplyParser.directTarget} gave. */
  received(count: number): void {
    this.#advanceData(count)
  }

  #advanceData(count: number): void {
    this.#dataStart += count
    this.#dataLeft -= count
    if (this.#dataLeft === 0) this.#endChunk()
  }

  #expect(stage: Stage | 'data', need: number): void {
    this.#stage = stage
    this.#need = need
  }

  /** The 16 bytes of a simple reply, or the first 16 of a chunk's 20. */
  #parseMagic(bytes: Buffer, at: number): void {
    const magic = bytes.readUInt32BE(at)
    const isSimple = magic === MAGIC_SIMPLE_REPLY
    if (!isSimple && magic !== MAGIC_STRUCTURED_REPLY) throw protocolError('a reply has a wrong magic')
    this.#cookie = bytes.readUInt32BE(at + 12)
    const request = bytes.readUInt32BE(at + 8) === 0 ? this.#listener.find(this.#cookie) : undefined
    if (!request) throw protocolError('it replies to a request that was not sent')
    this.#request = request
    if (isSimple) {
      this.#parseSimple(request, bytes.readUInt32BE(at + 4))
      return
    }
    if (!this.#export.structuredReplies) throw protocolError('a structured reply that was not agreed to')
    this.#isLast = (bytes.readUInt16BE(at + 4) & CHUNK_DONE) !== 0
    this.#type = bytes.readUInt16BE(at + 6)
    this.#expect('chunk', 4)
  }

  #parseSimple(request: Request, error: number): void {
    const { command, length, offset } = request
    this.#isLast = true
    if (error !== 0) request.error ??= serverError(request, error)
    else if (command === COMMAND.blockStatus || (command === COMMAND.read && this.#export.structuredReplies))
      throw protocolError('a simple reply where a structured one was agreed to')
    if (error === 0 && command === COMMAND.read) this.#expectData(request, offset, length)
    else this.#endChunk()
  }

  #parseChunk(bytes: Buffer, at: number): void {
    const length = bytes.readUInt32BE(at)
    const type = this.#type
    this.#payload = length
    const { command } = this.#currentRequest()
    if ((type & CHUNK_ERROR_BIT) !== 0) {
      if (length < 6 || length > MAX_ERROR)
        throw protocolError('an error chunk of a wrong length', { length })
      this.#expect('error', length)
    } else if (type === CHUNK.none) {
      if (length !== 0 || !this.#isLast)
        throw protocolError('an empty chunk that is not empty or not the last')
      this.#endChunk()
    } else if (type === CHUNK.offsetData && command === COMMAND.read) {
      if (length < 9) throw protocolError('a data chunk without data', { length })
      this.#expect('dataOffset', 8)
    } else if (type === CHUNK.offsetHole && command === COMMAND.read) {
      if (length !== 12) throw protocolError('a hole chunk of a wrong length', { length })
      this.#expect('hole', 12)
    } else if (type === CHUNK.blockStatus && command === COMMAND.blockStatus) {
      if (length < 12 || (length - 4) % 8 !== 0 || length > 4 + 8 * MAX_EXTENTS_PER_REPLY)
        throw protocolError('a block status chunk of a wrong length', { length })
      this.#expect('context', 4)
    } else {
      throw protocolError('a chunk that the request did not ask for', { type, command })
    }
  }

  #parseDataOffset(bytes: Buffer, at: number): void {
    this.#expectData(this.#currentRequest(), readOffset(bytes, at), this.#payload - 8)
  }

  #expectData(request: Request, start: number, length: number): void {
    cover(request, start, length)
    this.#dataStart = start
    this.#dataLeft = length
    this.#expect('data', 0)
  }

  #parseHole(bytes: Buffer, at: number): void {
    const request = this.#currentRequest()
    const start = readOffset(bytes, at)
    const length = bytes.readUInt32BE(at + 8)
    if (length === 0) throw protocolError('a hole of no length')
    cover(request, start, length)
    const place = start - request.operation.offset
    request.operation.buffer?.fill(0, place, place + length)
    this.#endChunk()
  }

  #parseError(bytes: Buffer, at: number): void {
    const request = this.#currentRequest()
    const number = bytes.readUInt32BE(at)
    const textLength = bytes.readUInt16BE(at + 4)
    const afterText = this.#payload - 6 - textLength
    const expected = this.#type === CHUNK.errorOffset ? 8 : 0
    const isKnown = this.#type === CHUNK.error || this.#type === CHUNK.errorOffset
    if (number === 0 || afterText < 0 || (isKnown && afterText !== expected))
      throw protocolError('an error chunk that contradicts itself', { number, textLength })
    if (++request.errorCount > MAX_ERRORS) throw protocolError('errors without end')
    const text = bytes.subarray(at + 6, at + 6 + textLength)
    if (this.#type === CHUNK.errorOffset) {
      const where = readOffset(bytes, at + 6 + textLength)
      if (where < request.offset || where >= request.offset + request.length)
        throw protocolError('an error at an offset outside the request', { where })
    }
    request.error ??= serverError(request, number, serverText(text))
    this.#endChunk()
  }

  #parseContext(bytes: Buffer, at: number): void {
    const request = this.#currentRequest()
    const id = bytes.readUInt32BE(at)
    const name = this.#export.metaContexts.get(id)
    if (name === undefined) throw protocolError('the status of an unknown context', { id })
    request.status ??= new Map()
    if (request.status.has(name)) throw protocolError('the status of a context twice in one reply', { name })
    this.#extents = emptyStatus()
    request.status.set(name, this.#extents)
    this.#payload -= 4
    this.#expect('extent', 8)
  }

  #parseExtent(bytes: Buffer, at: number): void {
    const request = this.#currentRequest()
    const extents = this.#extents
    const length = bytes.readUInt32BE(at)
    const end = request.offset + extents.covered + length
    const isAligned = length % this.#export.blockSize.minimum === 0 || end >= this.#export.size
    if (length === 0 || !isAligned) throw protocolError('an extent of a length that cannot be', { length })
    if (extents.covered >= request.length || !appendStatus(extents, length, bytes.readUInt32BE(at + 4)))
      throw protocolError('more extents than were asked for')
    this.#payload -= 8
    if (this.#payload === 0) this.#endChunk()
  }

  #endChunk(): void {
    const request = this.#currentRequest()
    this.#request = undefined
    this.#expect('magic', 16)
    if (!this.#isLast) return
    if (!request.error) this.#checkWhole(request)
    this.#listener.done(this.#cookie, request)
  }

  #checkWhole(request: Request): void {
    if (request.command === COMMAND.read && !request.coverage.isComplete(request.length))
      throw protocolError('a reply ended before all bytes were sent', describeRequest(request))
    if (request.command === COMMAND.blockStatus && request.status?.size !== this.#export.metaContexts.size)
      throw protocolError('a block status reply leaves a context out', describeRequest(request))
  }

  #currentRequest(): Request {
    if (!this.#request) throw new Error('no chunk is being received')
    return this.#request
  }
}

function cover(request: Request, start: number, length: number): void {
  const from = start - request.offset
  const inside = from >= 0 && from + length <= request.length
  if (!inside)
    throw protocolError('a chunk lies outside its request', {
      ...describeRequest(request),
      start,
      size: length,
    })
  if (!request.coverage.add(from, from + length))
    throw protocolError('bytes of a read came twice or too scattered', describeRequest(request))
}

/** An offset of 64 bits; one above 2^53 is not exact, but outside of every request just the same. */
function readOffset(bytes: Buffer, at: number): number {
  return bytes.readUInt32BE(at) * 2 ** 32 + bytes.readUInt32BE(at + 4)
}
