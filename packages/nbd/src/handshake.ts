import type { ByteQueue } from './byte-queue.ts'
import { NbdError, protocolError, serverText } from './errors.ts'
import {
  DEFAULT_MAX_PAYLOAD,
  HANDSHAKE,
  INFO,
  MAGIC_INIT,
  MAGIC_OPTION,
  MAGIC_OPTION_REPLY,
  MAX_STRING,
  OPTION,
  OPTION_ERROR,
  OPTION_ERROR_BIT,
  OPTION_REPLY,
  TRANSMISSION,
} from './protocol.ts'

/** The block size constraints of an export, in bytes. */
export interface NbdBlockSize {
  /** Requests must begin and end on multiples of this; a power of two, at most 64 KiB. */
  readonly minimum: number
  /** Requests of multiples of this are handled best. */
  readonly preferred: number
  /** The largest payload of a request; 0xffffffff for no limit. */
  readonly maximum: number
}

/** What a server agreed to in the negotiation. */
export interface NbdExport {
  /** In bytes. */
  readonly size: number
  /** Transmission flags, see {@link TRANSMISSION}. */
  readonly flags: number
  readonly blockSize: NbdBlockSize
  /** Whether replies are structured. Without it there are no block status requests. */
  readonly structuredReplies: boolean
  /** The agreed metadata contexts: the names by the ids that block status replies use. */
  readonly metaContexts: ReadonlyMap<number, string>
}

/** What the client wants. */
export interface NegotiationRequest {
  readonly exportName: string
  readonly metaContexts: readonly string[]
}

interface OptionReply {
  readonly type: number
  readonly payload: Buffer
}

/** No reply of the options that are used here is longer: an id or type and a string, or sizes. */
const MAX_OPTION_REPLY = MAX_STRING + 64
/** More replies than this to one option are a server that never ends. */
const MAX_REPLIES_PER_OPTION = 64

/**
 * Fixed newstyle negotiation up to the transmission phase: structured replies, metadata contexts, `OPT_GO` with
 * block size constraints.
 *
 * Throws `NBD_PROTOCOL` for a server that breaks the protocol, `NBD_CONNECT` for one that refuses.
 */
export async function negotiate(
  incoming: ByteQueue,
  send: (bytes: Uint8Array) => void,
  request: NegotiationRequest,
): Promise<NbdExport> {
  await greet(incoming, send)

  /** Sends an option, hands over the replies as they come, and tells why it was refused, if it was. */
  const ask = (option: number, payload: Uint8Array, onReply: (reply: OptionReply) => void) => {
    const header = Buffer.alloc(16)
    header.writeBigUInt64BE(MAGIC_OPTION, 0)
    header.writeUInt32BE(option, 8)
    header.writeUInt32BE(payload.length, 12)
    send(Buffer.concat([header, payload]))
    return receiveReplies(incoming, option, onReply)
  }

  const refusal = await ask(OPTION.structuredReply, Buffer.alloc(0), ({ type, payload }) => {
    throw protocolError('a wrong reply to structured replies', { type, length: payload.length })
  })
  const structuredReplies = refusal === undefined

  const metaContexts = new Map<number, string>()
  if (structuredReplies && request.metaContexts.length > 0) {
    const none = await ask(OPTION.setMetaContext, metaContextQuery(request), reply =>
      addMetaContext(metaContexts, reply, request.metaContexts),
    )
    // A server without contexts refuses the option; the caller sees that none was agreed to.
    if (none) metaContexts.clear()
  }

  const found: ExportInfo = { blockSize: { minimum: 1, preferred: 4096, maximum: DEFAULT_MAX_PAYLOAD } }
  const refused = await ask(OPTION.go, goRequest(request.exportName), reply => addExportInfo(found, reply))
  if (refused) {
    const text = `The NBD server refused the export "${request.exportName}": ${refused}.`
    throw new NbdError('NBD_CONNECT', text, { context: { exportName: request.exportName } })
  }
  const { size, flags, blockSize } = found
  if (size === undefined || flags === undefined)
    throw protocolError('it does not tell the size of the export')
  return { size, flags, blockSize, structuredReplies, metaContexts }
}

async function greet(incoming: ByteQueue, send: (bytes: Uint8Array) => void): Promise<void> {
  const hello = await incoming.take(16)
  if (hello.readBigUInt64BE(0) !== MAGIC_INIT) throw protocolError('it does not begin as an NBD server does')
  if (hello.readBigUInt64BE(8) !== MAGIC_OPTION) {
    throw new NbdError('NBD_CONNECT', 'The NBD server only knows the old negotiation without options.')
  }
  const flags = (await incoming.take(2)).readUInt16BE(0)
  if ((flags & HANDSHAKE.fixedNewstyle) === 0) {
    throw new NbdError('NBD_CONNECT', 'The NBD server does not know the fixed newstyle negotiation.')
  }
  const answer = Buffer.alloc(4)
  answer.writeUInt32BE(flags & (HANDSHAKE.fixedNewstyle | HANDSHAKE.noZeroes), 0)
  send(answer)
}

/** Receives the replies to one option up to its ACK; returns why it was refused, if it was. */
async function receiveReplies(
  incoming: ByteQueue,
  option: number,
  onReply: (reply: OptionReply) => void,
): Promise<string | undefined> {
  for (let count = 0; count <= MAX_REPLIES_PER_OPTION; count++) {
    const header = await incoming.take(20)
    if (header.readBigUInt64BE(0) !== MAGIC_OPTION_REPLY)
      throw protocolError('an option reply has a wrong magic')
    if (header.readUInt32BE(8) !== option) throw protocolError('it replies to an option that was not sent')
    const type = header.readUInt32BE(12)
    const length = header.readUInt32BE(16)
    if (length > MAX_OPTION_REPLY) throw protocolError('an option reply is too long', { option, length })
    if (type === OPTION_REPLY.ack && length > 0)
      throw protocolError('an ACK has a payload', { option, length })
    const payload = await incoming.take(length)
    if (type === OPTION_REPLY.ack) return undefined
    if (type >= OPTION_ERROR_BIT) return describeRefusal(type - OPTION_ERROR_BIT, payload)
    onReply({ type, payload })
  }
  throw protocolError('an option has too many replies', { option })
}

function describeRefusal(number: number, payload: Buffer): string {
  const text = serverText(payload)
  const reason = OPTION_ERROR[number] ?? `error ${number}`
  return text ? `${reason} (${text})` : reason
}

function metaContextQuery(request: NegotiationRequest): Buffer {
  const count = Buffer.alloc(4)
  count.writeUInt32BE(request.metaContexts.length)
  return Buffer.concat([prefixed(request.exportName), count, ...request.metaContexts.map(prefixed)])
}

function goRequest(exportName: string): Buffer {
  const infos = Buffer.alloc(4)
  infos.writeUInt16BE(1, 0)
  infos.writeUInt16BE(INFO.blockSize, 2)
  return Buffer.concat([prefixed(exportName), infos])
}

function prefixed(text: string): Buffer {
  const bytes = Buffer.from(text)
  const length = Buffer.alloc(4)
  length.writeUInt32BE(bytes.length)
  return Buffer.concat([length, bytes])
}

function addMetaContext(
  contexts: Map<number, string>,
  { type, payload }: OptionReply,
  wanted: readonly string[],
): void {
  if (type !== OPTION_REPLY.metaContext || payload.length < 4)
    throw protocolError('a wrong reply to the choice of metadata contexts', { type, length: payload.length })
  const id = payload.readUInt32BE(0)
  const name = payload.toString('utf8', 4)
  if (!wanted.includes(name)) throw protocolError('it agrees to a metadata context that was not asked for')
  if (contexts.has(id) || [...contexts.values()].includes(name))
    throw protocolError('it names a metadata context twice')
  contexts.set(id, name)
}

/** What the replies to `OPT_GO` have told. */
interface ExportInfo {
  size?: number
  flags?: number
  blockSize: NbdBlockSize
}

function addExportInfo(found: ExportInfo, { type, payload }: OptionReply): void {
  if (type !== OPTION_REPLY.info || payload.length < 2)
    throw protocolError('a wrong reply to the choice of the export', { type, length: payload.length })
  const kind = payload.readUInt16BE(0)
  if (kind === INFO.export) Object.assign(found, parseSizeAndFlags(payload))
  else if (kind === INFO.blockSize) found.blockSize = parseBlockSize(payload)
  // Other kinds may be sent unasked and mean nothing here.
}

function parseSizeAndFlags(payload: Buffer): { size: number; flags: number } {
  if (payload.length !== 12) throw protocolError('wrong length of the export information')
  const size = payload.readBigUInt64BE(2)
  if (size > BigInt(Number.MAX_SAFE_INTEGER)) {
    throw new NbdError('NBD_CONNECT', `The export is too large: ${size} bytes.`)
  }
  const flags = payload.readUInt16BE(10)
  if ((flags & TRANSMISSION.hasFlags) === 0) throw protocolError('the export has no transmission flags')
  return { size: Number(size), flags }
}

function parseBlockSize(payload: Buffer): NbdBlockSize {
  if (payload.length !== 14) throw protocolError('wrong length of the block size information')
  const minimum = payload.readUInt32BE(2)
  const preferred = payload.readUInt32BE(6)
  const maximum = payload.readUInt32BE(10)
  const valid =
    isPowerOfTwo(minimum) &&
    minimum <= 65536 &&
    isPowerOfTwo(preferred) &&
    preferred >= Math.max(512, minimum) &&
    maximum >= minimum &&
    (maximum === 0xffffffff || maximum % minimum === 0)
  if (!valid) throw protocolError('block sizes that cannot be', { minimum, preferred, maximum })
  return { minimum, preferred, maximum }
}

function isPowerOfTwo(value: number): boolean {
  return value > 0 && Number.isInteger(Math.log2(value))
}

/** Refuses an export that is not the one that was negotiated before, with `NBD_CONNECT`. */
export function assertSameExport(before: NbdExport, now: NbdExport): void {
  const contexts = (of: NbdExport) => [...of.metaContexts.values()].sort()
  const properties = (of: NbdExport) =>
    JSON.stringify([of.size, of.flags, of.blockSize, of.structuredReplies, contexts(of)])
  if (properties(before) === properties(now)) return
  throw new NbdError(
    'NBD_CONNECT',
    'The NBD server now has an export of another size, other flags or other metadata contexts.',
    { context: { changed: true, sizeBefore: before.size, sizeNow: now.size } },
  )
}
