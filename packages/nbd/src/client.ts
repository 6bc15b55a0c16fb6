import type { NbdAddress } from './address.ts'
import { type BlockEdge, splitAtBlocks } from './block-edges.ts'
import { Connection } from './connection.ts'
import { Dispatcher } from './dispatcher.ts'
import { NbdError } from './errors.ts'
import { type ExtentMap, ExtentMapBuilder, type FlagsRule } from './extent-map.ts'
import type { NbdBlockSize, NbdExport } from './handshake.ts'
import { MapBudget } from './map-budget.ts'
import { Operation, type OperationFields } from './operation.ts'
import { COMMAND, COMMAND_FLAG, DEFAULT_MAX_PAYLOAD, MAX_STRING, TRANSMISSION } from './protocol.ts'
import { emptyStatus, type StatusExtents } from './status-reply.ts'

/** Options of {@link NbdClient.connect}. */
export interface NbdConnectOptions {
  /** The export. Default: `''`, the server's default export. */
  exportName?: string
  /** Metadata contexts to ask for, such as `base:allocation` or `qemu:dirty-bitmap:NAME`. Default: none. */
  metaContexts?: readonly string[]
  /** The most connections to use. More than one is opened only where the server says that it keeps them coherent. Default: 4. */
  connections?: number
  /** How long the server may make no progress, in milliseconds: in the negotiation, or with the oldest request on a connection. Default: 60000. */
  timeoutMs?: number
  /**
   * The same for a flush, and for a change with `fua`: how long the server may take to make durable what was written, of
   * which it tells nothing until it is done. With a large page cache over slow storage that can be many minutes. Default:
   * 3600000, an hour.
   */
  flushTimeoutMs?: number
  /** The largest read or write to send as one request, in bytes; not above what the server allows. Default: 256 KiB. */
  maxRequestBytes?: number
  /** Gives up connecting. */
  signal?: AbortSignal
}

/** Options of every request. */
export interface NbdRequestOptions {
  /** Gives the request up; it fails with `NBD_ABORTED`. */
  signal?: AbortSignal
}

/** Options of the requests that change data. */
export interface NbdWriteOptions extends NbdRequestOptions {
  /** Whether the change is durable when the request is done. Default: false. */
  fua?: boolean
}

/** Options of {@link NbdClient.writeZeroes}. */
export interface NbdWriteZeroesOptions extends NbdWriteOptions {
  /** Whether the range may become a hole. Default: true. */
  allowTrim?: boolean
}

/** Options of {@link NbdClient.mapExtents}. */
export interface NbdMapOptions extends NbdRequestOptions {
  /**
   * Bytes of a piece: a power of two up to 2^30. Within a piece all flags are the same: of `base:allocation` those that all
   * of its bytes have, so that it is data if any part is; of `qemu:dirty-bitmap:NAME` those that any has, so that it is dirty
   * if any part is. Other contexts are not rounded. Default: 1, which tells all as the server does.
   */
  granularity?: number
  /**
   * Called with every extent as the server knows it, before it is rounded: in ascending order, without gaps between those
   * of one context, where neighbours may have equal flags. What it throws ends the call.
   */
  onExtent?: (context: string, start: number, end: number, flags: number) => void
}

/** One extent of a block status reply. */
export interface NbdExtent {
  /** In bytes. */
  readonly length: number
  /** Status flags; what they mean depends on the context, see {@link ExtentMap.flags}. */
  readonly flags: number
}

/** The longest block status request: the largest multiple of every block size that fits in 32 bits. */
const MAX_STATUS_REQUEST = 0xffff0000
/** The first and the shortest such request of a map. It grows as long as the server is quick to answer. */
const MIN_STATUS_REQUEST = 64 * 1024 * 1024
/** An answer after this time is slow: the server may look for each hole in a file on a slow file system. */
const SLOW_STATUS_MS = 1000
/** qemu-nbd gives the memory of larger ones back to the system after each, which can cost more than all else; smaller ones cost more CPU. */
const DEFAULT_MAX_REQUEST = 256 * 1024

/**
 * A client of one NBD export.
 *
 * Calls run at the same time; each is split into requests that are pipelined over the connections. A lost
 * connection is opened again and the reads on it are sent again, unseen by the caller; a write on it fails with
 * `NBD_DISCONNECTED`, since it may or may not have happened. All errors are {@link NbdError}s.
 *
 * A caller's memory is not touched any more once its call has settled.
 */
export class NbdClient implements AsyncDisposable {
  /** The size of the export in bytes. */
  readonly size: number
  /** Whether the export cannot be written to. */
  readonly readOnly: boolean
  /** Whether the server keeps several connections coherent. */
  readonly multiConn: boolean
  /** The block size constraints of the server. */
  readonly blockSize: NbdBlockSize
  /** The metadata contexts that the server agreed to. */
  readonly metaContexts: readonly string[]

  readonly #dispatcher: Dispatcher
  readonly #flags: number
  readonly #maxPayload: number

  private constructor(negotiated: NbdExport, dispatcher: Dispatcher, maxPayload: number) {
    this.size = negotiated.size
    this.readOnly = (negotiated.flags & TRANSMISSION.readOnly) !== 0
    this.multiConn = (negotiated.flags & TRANSMISSION.multiConn) !== 0
    this.blockSize = negotiated.blockSize
    this.metaContexts = [...negotiated.metaContexts.values()]
    this.#dispatcher = dispatcher
    this.#flags = negotiated.flags
    this.#maxPayload = maxPayload
  }

  /**
   * Connects to a server.
   *
   * Throws `NBD_CONNECT` when it cannot be reached, does not have the export or has one above 2^53 bytes,
   * `NBD_TIMEOUT` when it does not answer, `NBD_PROTOCOL` when it is no NBD server, `NBD_ARGUMENT`, `NBD_ABORTED`.
   */
  static async connect(address: NbdAddress, options: NbdConnectOptions = {}): Promise<NbdClient> {
    const { exportName = '', timeoutMs = 60_000, flushTimeoutMs = 3_600_000 } = options
    const { connections = 4, signal } = options
    const { maxRequestBytes = DEFAULT_MAX_REQUEST } = options
    const metaContexts = [...new Set(options.metaContexts)]
    for (const text of [exportName, ...metaContexts])
      if (Buffer.byteLength(text) > MAX_STRING) throw badArgument('a name is longer than 4096 bytes')
    assertWhole('timeoutMs', timeoutMs, 1, 2 ** 31 - 1)
    assertWhole('flushTimeoutMs', flushTimeoutMs, 1, 2 ** 31 - 1)
    assertWhole('connections', connections, 1, 64)
    assertWhole('maxRequestBytes', maxRequestBytes, 1, DEFAULT_MAX_PAYLOAD)

    const negotiation = { exportName, metaContexts }
    const connection = { address, negotiation, timeoutMs, flushTimeoutMs }
    const first = await Connection.open({ ...connection, signal })
    const { negotiated } = first
    const { minimum, maximum } = negotiated.blockSize
    const multiConn = (negotiated.flags & TRANSMISSION.multiConn) !== 0
    const dispatcher = new Dispatcher(first, { connection, maxConnections: multiConn ? connections : 1 })
    const largest = Math.min(maximum, Math.max(maxRequestBytes, minimum))
    return new NbdClient(negotiated, dispatcher, largest - (largest % minimum))
  }

  /** Reads into the whole of `into`, from `offset` on. Neither needs to fit the server's block size. */
  async read(offset: number, into: Uint8Array, options: NbdRequestOptions = {}): Promise<void> {
    this.#assertRange(offset, into.length)
    const { aligned, edges } = splitAtBlocks(offset, offset + into.length, this.blockSize.minimum, this.size)
    if (edges.length === 0) return this.#readAligned(offset, into, options)

    const parts = edges.map(edge => this.#readEdge(edge, into.subarray(edge.start - offset), options))
    if (aligned.start < aligned.end) {
      const middle = into.subarray(aligned.start - offset, aligned.end - offset)
      parts.push(this.#readAligned(aligned.start, middle, options))
    }
    await settleAll(parts)
  }

  /** Writes `data` at `offset`; it must not change until the call has settled. Both must fit the server's block size. */
  async write(offset: number, data: Uint8Array, options: NbdWriteOptions = {}): Promise<void> {
    this.#assertWritable(offset, data.length)
    if (data.length === 0) return
    await this.#change(
      { command: COMMAND.write, flags: 0, offset, length: data.length, data, maxRequest: this.#maxPayload },
      options,
    )
  }

  /** Makes a range read as zero. Both `offset` and `length` must fit the server's block size. */
  async writeZeroes(offset: number, length: number, options: NbdWriteZeroesOptions = {}): Promise<void> {
    this.#assertWritable(offset, length)
    if ((this.#flags & TRANSMISSION.writeZeroes) === 0) return this.#writeZeroBytes(offset, length, options)
    if (length === 0) return
    const flags = options.allowTrim === false ? COMMAND_FLAG.noHole : 0
    await this.#change(
      { command: COMMAND.writeZeroes, flags, offset, length, maxRequest: this.#maxWithoutData },
      options,
    )
  }

  /** Tells the server that a range is not needed: it may read as anything afterwards. A server that does not know the request is not asked. */
  async trim(offset: number, length: number, options: NbdWriteOptions = {}): Promise<void> {
    this.#assertWritable(offset, length)
    if (length === 0 || (this.#flags & TRANSMISSION.trim) === 0) return
    await this.#change(
      { command: COMMAND.trim, flags: 0, offset, length, maxRequest: this.#maxWithoutData },
      options,
    )
  }

  /**
   * Makes all writes durable that were done before the call. Fails with `NBD_DISCONNECTED` when a connection was
   * lost since some of them, as they may be lost too. A server without the request has nothing to flush.
   */
  async flush(options: NbdRequestOptions = {}): Promise<void> {
    const written = this.#dispatcher.acknowledgedWrites
    if ((this.#flags & TRANSMISSION.flush) === 0) return
    const fields = { command: COMMAND.flush, flags: 0, offset: 0, length: 0, maxRequest: 0 }
    await this.#dispatcher.submit(new Operation(fields), options.signal)
    this.#dispatcher.markFlushed(written)
  }

  /**
   * The extents of every agreed context from `offset` on, in one request: they never reach beyond the range, and
   * may cover less of it, each context its own part. `offset` must fit the server's block size.
   */
  async blockStatus(
    offset: number,
    length: number,
    options: NbdRequestOptions = {},
  ): Promise<ReadonlyMap<string, readonly NbdExtent[]>> {
    const status = await this.#blockStatus(offset, length, options)
    const clipped = new Map<string, readonly NbdExtent[]>()
    for (const [name, extents] of status) clipped.set(name, clip(extents, length))
    return clipped
  }

  /**
   * The extents of the whole export, of every agreed context. Nothing may be written to it meanwhile. Each context takes
   * at most 192 MiB of memory, and twice that for the moment in which it becomes whole.
   *
   * Throws `NBD_FRAGMENTED` for more than 16,777,215 extents in one context, once they are rounded and joined, and for more
   * than 268,435,456 in all before; `NBD_PROTOCOL` for a server that tells next to nothing in each of its replies.
   */
  async mapExtents(options: NbdMapOptions = {}): Promise<ReadonlyMap<string, ExtentMap>> {
    const { granularity = 1 } = options
    assertWhole('granularity', granularity, 1, 2 ** 30)
    if (!Number.isInteger(Math.log2(granularity))) throw badArgument('granularity must be a power of two')
    const builders = new Map(this.metaContexts.map(name => [name, this.#mapBuilder(name, options)]))
    const budget = new MapBudget()
    let offset = builders.size === 0 ? this.size : 0
    let longest = MIN_STATUS_REQUEST
    while (offset < this.size) {
      const length = Math.min(longest, MAX_STATUS_REQUEST, this.size - offset)
      const asked = performance.now()
      const status = await this.#blockStatus(offset, length, options)
      if (performance.now() - asked < SLOW_STATUS_MS) longest = Math.min(longest * 2, 2 ** 32)
      else longest = Math.max(longest / 2, MIN_STATUS_REQUEST)
      try {
        const count = appendAll(builders, offset, status)
        offset = Math.min(...[...builders.values()].map(({ end }) => end))
        budget.spend(count, offset)
      } catch (error) {
        if (error instanceof NbdError && error.code === 'NBD_PROTOCOL') this.#dispatcher.fail(error)
        throw error
      }
    }
    return new Map([...builders].map(([name, builder]) => [name, builder.build()]))
  }

  /** Ends the connections. Calls that are running fail with `NBD_DISCONNECTED`; later ones do too. May be called again. */
  close(): Promise<void> {
    return this.#dispatcher.close()
  }

  /** {@link NbdClient.close}, for `await using`. */
  [Symbol.asyncDispose](): Promise<void> {
    return this.close()
  }

  #mapBuilder(context: string, { granularity = 1, onExtent }: NbdMapOptions): ExtentMapBuilder {
    const join = flagsRule(context)
    return new ExtentMapBuilder({
      size: this.size,
      ...(join && { granularity, join }),
      onExtent: onExtent && ((start, end, flags) => onExtent(context, start, end, flags)),
    })
  }

  async #readAligned(offset: number, into: Uint8Array, options: NbdRequestOptions): Promise<void> {
    if (into.length === 0) return
    const operation = new Operation({
      command: COMMAND.read,
      flags: 0,
      offset,
      length: into.length,
      maxRequest: this.#maxPayload,
      buffer: into,
    })
    await this.#dispatcher.submit(operation, options.signal)
  }

  /** Reads the whole block and takes a part of it. */
  async #readEdge(edge: BlockEdge, into: Uint8Array, options: NbdRequestOptions): Promise<void> {
    const { block, start, end } = edge
    const whole = Buffer.allocUnsafe(Math.min(this.blockSize.minimum, this.size - block))
    await this.#readAligned(block, whole, options)
    into.set(whole.subarray(start - block, end - block))
  }

  /** The longest request without data in it. */
  get #maxWithoutData(): number {
    const { minimum, maximum } = this.blockSize
    const largest = Math.min(maximum, DEFAULT_MAX_PAYLOAD)
    return largest - (largest % minimum)
  }

  async #change(fields: OperationFields, options: NbdWriteOptions): Promise<void> {
    const fua = options.fua === true && (this.#flags & TRANSMISSION.fua) !== 0
    const flags = fields.flags | (fua ? COMMAND_FLAG.fua : 0)
    await this.#dispatcher.submit(new Operation({ ...fields, flags }), options.signal)
    if (options.fua && !fua) await this.flush(options)
  }

  async #writeZeroBytes(offset: number, length: number, options: NbdWriteZeroesOptions): Promise<void> {
    const zeroes = new Uint8Array(Math.min(length, this.#maxPayload))
    for (let done = 0; done < length; done += zeroes.length)
      await this.write(offset + done, zeroes.subarray(0, length - done), options)
  }

  async #blockStatus(
    offset: number,
    length: number,
    options: NbdRequestOptions,
  ): Promise<ReadonlyMap<string, StatusExtents>> {
    this.#assertRange(offset, length)
    if (this.metaContexts.length === 0) throw badArgument('no metadata context was agreed to')
    this.#assertAligned(offset, length)
    if (length === 0 || length > 0xffffffff) throw badArgument('a block status request has 1 to 2^32-1 bytes')
    const operation = new Operation({
      command: COMMAND.blockStatus,
      flags: 0,
      offset,
      length,
      maxRequest: length,
    })
    await this.#dispatcher.submit(operation, options.signal)
    return operation.status ?? new Map()
  }

  #assertRange(offset: number, length: number): void {
    const isWhole = Number.isSafeInteger(offset) && Number.isSafeInteger(length) && offset >= 0 && length >= 0
    if (!isWhole || offset + length > this.size)
      throw badArgument('the range is outside the export', { offset, length, size: this.size })
  }

  #assertAligned(offset: number, length: number): void {
    const { minimum } = this.blockSize
    const end = offset + length
    if (offset % minimum !== 0 || (end % minimum !== 0 && end !== this.size))
      throw badArgument('the range does not fit the block size of the server', { offset, length, minimum })
  }

  #assertWritable(offset: number, length: number): void {
    if (this.readOnly) throw badArgument('the export is read-only')
    this.#assertRange(offset, length)
    this.#assertAligned(offset, length)
  }
}

/** How the flags of a context are joined; undefined where that would not mean anything. */
function flagsRule(context: string): FlagsRule | undefined {
  // Both say what the bytes are not: a hole, or anything but zeros.
  if (context === 'base:allocation') return (one, other) => (one & other) >>> 0
  return context.startsWith('qemu:dirty-bitmap:') ? (one, other) => (one | other) >>> 0 : undefined
}

/** Adds what a reply tells of each context, and returns how many extents that was. */
function appendAll(
  builders: ReadonlyMap<string, ExtentMapBuilder>,
  offset: number,
  status: ReadonlyMap<string, StatusExtents>,
): number {
  let told = 0
  for (const [name, builder] of builders) {
    const { pairs, count } = status.get(name) ?? emptyStatus()
    let start = offset
    for (let at = 0; at < 2 * count; at += 2) {
      const length = pairs[at] ?? 0
      builder.append(start, length, pairs[at + 1] ?? 0)
      start += length
    }
    told += count
  }
  return told
}

function clip({ pairs, count }: StatusExtents, length: number): NbdExtent[] {
  const clipped: NbdExtent[] = []
  let left = length
  for (let at = 0; at < 2 * count; at += 2) {
    const extent = { length: Math.min(pairs[at] ?? 0, left), flags: pairs[at + 1] ?? 0 }
    left -= extent.length
    clipped.push(extent)
  }
  return clipped
}

/** Waits for all, so that none still uses the caller's memory, and then fails with the first failure. */
async function settleAll(parts: readonly Promise<void>[]): Promise<void> {
  const outcomes = await Promise.allSettled(parts)
  for (const outcome of outcomes) if (outcome.status === 'rejected') throw outcome.reason
}

function assertWhole(name: string, value: number, least: number, most: number): void {
  if (!Number.isInteger(value) || value < least || value > most)
    throw badArgument(`${name} must be a whole number from ${least} to ${most}`, { [name]: value })
}

function badArgument(what: string, context: Record<string, number> = {}): NbdError {
  return new NbdError('NBD_ARGUMENT', `Not a valid NBD request: ${what}.`, { context })
}
