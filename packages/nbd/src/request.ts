import { Coverage } from './coverage.ts'
import type { NbdError } from './errors.ts'
import type { Operation } from './operation.ts'
import { COMMAND, COMMAND_FLAG, MAGIC_REQUEST } from './protocol.ts'
import type { StatusExtents } from './status-reply.ts'

/** What a request asks for. */
export interface RequestFields {
  readonly command: number
  readonly flags: number
  readonly offset: number
  readonly length: number
  /** Of a write: the bytes. */
  readonly data?: Uint8Array | undefined
}

/** One request of the protocol, from its making to its reply; a replay is the same request once more. */
export class Request {
  readonly operation: Operation
  readonly command: number
  readonly flags: number
  readonly offset: number
  readonly length: number
  readonly data: Uint8Array | undefined
  /** Which bytes of a read have arrived. */
  coverage: Coverage = new Coverage()
  /** What a block status reply has told so far, by the name of the context. */
  status: Map<string, StatusExtents> | undefined
  /** The first error that the server gave. */
  error: NbdError | undefined
  /** How many error chunks the server gave. */
  errorCount = 0
  /** How many connections were lost with this request on them. */
  losses = 0

  constructor(operation: Operation, fields: RequestFields) {
    this.operation = operation
    this.command = fields.command
    this.flags = fields.flags
    this.offset = fields.offset
    this.length = fields.length
    this.data = fields.data
  }

  /** The bytes of data that the request moves, one way or the other. */
  get payloadBytes(): number {
    return this.command === COMMAND.read || this.command === COMMAND.write ? this.length : 0
  }

  /** Whether the server answers only when what was written is durable: it then tells nothing until the disks have all. */
  get isFlush(): boolean {
    return this.command === COMMAND.flush || (this.flags & COMMAND_FLAG.fua) !== 0
  }

  /** Whether it changes nothing at the server, so that it can be sent again when its reply was lost. */
  get isReplayable(): boolean {
    return this.command === COMMAND.read || this.command === COMMAND.blockStatus
  }

  /** Forgets the part of a reply that has arrived, before the request is sent again. */
  restart(): void {
    this.coverage = new Coverage()
    this.status = undefined
    this.error = undefined
    this.errorCount = 0
  }
}

/** Whether a command changes the export's bytes. */
export function isMutation(command: number): boolean {
  return command === COMMAND.write || command === COMMAND.writeZeroes || command === COMMAND.trim
}

/** Writes a request's header of 28 bytes to `target` at `at`. */
export function encodeHeader(
  target: Buffer,
  at: number,
  cookie: number,
  fields: Pick<RequestFields, 'command' | 'flags' | 'offset' | 'length'>,
): void {
  target.writeUInt32BE(MAGIC_REQUEST, at)
  target.writeUInt16BE(fields.flags, at + 4)
  target.writeUInt16BE(fields.command, at + 6)
  target.writeUInt32BE(0, at + 8)
  target.writeUInt32BE(cookie, at + 12)
  target.writeUInt32BE(Math.floor(fields.offset / 2 ** 32), at + 16)
  target.writeUInt32BE(fields.offset % 2 ** 32, at + 20)
  target.writeUInt32BE(fields.length, at + 24)
}
