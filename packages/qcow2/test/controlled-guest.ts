import type { GuestReader } from '../src/index.ts'

/** A read that waits for the test to settle it. */
export interface PendingRead {
  readonly offset: number
  readonly into: Uint8Array
  readonly signal: AbortSignal | undefined
  /** Fills the memory with the guest's bytes and ends the read. */
  complete(): void
  fail(error: Error): void
}

/** A guest that answers when it is told to. */
export class ControlledGuest implements GuestReader {
  /** All reads so far, in the order in which they were asked for. */
  readonly reads: PendingRead[] = []
  readonly #disk: Uint8Array

  constructor(disk: Uint8Array) {
    this.#disk = disk
  }

  read(offset: number, into: Uint8Array, options?: { signal?: AbortSignal }): Promise<void> {
    const { promise, resolve, reject } = Promise.withResolvers<void>()
    this.reads.push({
      offset,
      into,
      signal: options?.signal,
      complete: () => {
        into.set(this.#disk.subarray(offset, offset + into.length))
        resolve()
      },
      fail: reject,
    })
    return promise
  }

  /** The read number `index`. */
  at(index: number): PendingRead {
    const read = this.reads[index]
    if (!read) throw new Error(`There were only ${this.reads.length} reads.`)
    return read
  }
}
