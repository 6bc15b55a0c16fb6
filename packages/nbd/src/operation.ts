import type { NbdError } from './errors.ts'
import { Request } from './request.ts'
import type { StatusExtents } from './status-reply.ts'

/** What a caller asked for: a range of any length, handled by as many requests as it takes. */
export interface OperationFields {
  readonly command: number
  readonly flags: number
  readonly offset: number
  /** In bytes; 0 for a request without a range. */
  readonly length: number
  /** The longest request to split it into, in bytes. */
  readonly maxRequest: number
  /** Of a write: the bytes. */
  readonly data?: Uint8Array
  /** Of a read: where the bytes go. */
  readonly buffer?: Uint8Array
}

/**
 * One call of a caller, and the promise that it waits for. It makes its requests one by one as there is room for
 * them, so that a call for a whole disk costs no more memory than one for a block.
 *
 * It settles only when none of its requests is on a connection any more, or when the caller gives it up; in
 * either case nothing touches the caller's memory afterwards.
 */
export class Operation {
  readonly promise: Promise<void>
  readonly command: number
  readonly offset: number
  /** Where a read's bytes go; undefined once the caller has given up, and they go nowhere. */
  buffer: Uint8Array | undefined
  /** Of a block status request: what the server told, by the name of the context. */
  status: ReadonlyMap<string, StatusExtents> | undefined

  readonly #fields: OperationFields
  #resolve: () => void
  #reject: (error: NbdError) => void
  #isSettled = false
  /** Bytes of the range that requests were made for. */
  #made = 0
  #isAllMade = false
  /** Requests that were made and are not finished. */
  #open = 0
  #error: NbdError | undefined
  /** How often a socket holds the caller's memory: receives right into the buffer, or has data to send. */
  #lent = 0
  #givenUp: NbdError | undefined

  constructor(fields: OperationFields) {
    this.#fields = fields
    this.command = fields.command
    this.offset = fields.offset
    this.buffer = fields.buffer
    const { promise, resolve, reject } = Promise.withResolvers<void>()
    this.promise = promise
    this.#resolve = resolve
    this.#reject = reject
  }

  /** Whether its promise is settled. */
  get isSettled(): boolean {
    return this.#isSettled
  }

  /** Whether the caller does not wait for the outcome any more. */
  get isGivenUp(): boolean {
    return this.#givenUp !== undefined
  }

  /** Whether it makes no more requests. */
  get isExhausted(): boolean {
    return this.#isAllMade || this.#error !== undefined || this.isGivenUp
  }

  /** The next request to send; not when it is exhausted. */
  nextRequest(): Request {
    const { command, flags, offset, length, maxRequest, data } = this.#fields
    const start = this.#made
    const size = Math.min(maxRequest, length - start)
    this.#made += size
    this.#isAllMade = this.#made === length
    this.#open++
    return new Request(this, {
      command,
      flags,
      offset: offset + start,
      length: size,
      data: data?.subarray(start, start + size),
    })
  }

  /** A request has ended, well or with `error`. */
  finish(request: Request, error: NbdError | undefined): void {
    this.#open--
    this.#error ??= error
    this.status = request.status
    if (this.#open === 0 && this.isExhausted && !this.isGivenUp) this.#settle(this.#error)
  }

  /** The buffer, or a piece of the data, is handed to a socket, until {@link Operation.giveBack}. */
  lend(): void {
    this.#lent++
  }

  /** A socket does not hold it any more. */
  giveBack(): void {
    this.#lent--
    if (this.#givenUp && this.#lent === 0) this.#settle(this.#givenUp)
  }

  /** What still arrives goes nowhere. Settles with `error` now, or as soon as no socket holds the caller's memory. */
  giveUp(error: NbdError): void {
    this.#givenUp ??= error
    this.buffer = undefined
    if (this.#lent === 0) this.#settle(this.#givenUp)
  }

  #settle(error: NbdError | undefined): void {
    if (this.#isSettled) return
    this.#isSettled = true
    if (error) this.#reject(error)
    else this.#resolve()
  }
}
