import type { NbdError } from './errors.ts'

/**
 * Bytes of the negotiation: pushed as they arrive, taken in the lengths that the protocol asks for.
 *
 * It stays small without a limit: what is pushed is taken, or refused, before the next bytes are received.
 */
export class ByteQueue {
  #bytes: Buffer = Buffer.alloc(0)
  #error: NbdError | undefined
  #waiting:
    | { length: number; resolve: (bytes: Buffer) => void; reject: (error: NbdError) => void }
    | undefined

  /** How many bytes have arrived and not been taken. */
  get length(): number {
    return this.#bytes.length
  }

  /** Adds a copy of `bytes`. */
  push(bytes: Uint8Array): void {
    this.#bytes = Buffer.concat([this.#bytes, bytes])
    const waiting = this.#waiting
    if (waiting && this.#bytes.length >= waiting.length) {
      this.#waiting = undefined
      waiting.resolve(this.#cut(waiting.length))
    }
  }

  /** The next `length` bytes, once they have arrived. One call at a time. */
  take(length: number): Promise<Buffer> {
    if (this.#bytes.length >= length) return Promise.resolve(this.#cut(length))
    if (this.#error) return Promise.reject(this.#error)
    return new Promise((resolve, reject) => {
      this.#waiting = { length, resolve, reject }
    })
  }

  /** No more bytes will come: what waits for them fails with `error`. */
  fail(error: NbdError): void {
    this.#error ??= error
    this.#waiting?.reject(error)
    this.#waiting = undefined
  }

  #cut(length: number): Buffer {
    const cut = this.#bytes.subarray(0, length)
    this.#bytes = this.#bytes.subarray(length)
    return cut
  }
}
