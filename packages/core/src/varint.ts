/** Bytes that grow as they are written. */
export class ByteWriter {
  #bytes: Uint8Array = new Uint8Array(4096)
  #length = 0

  /** What was written so far, without a copy. */
  get written(): Uint8Array {
    return this.#bytes.subarray(0, this.#length)
  }

  /** How many bytes were written so far. */
  get length(): number {
    return this.#length
  }

  /** Writes bytes as they are. */
  bytes(bytes: Uint8Array): void {
    this.#reserve(bytes.length)
    this.#bytes.set(bytes, this.#length)
    this.#length += bytes.length
  }

  /** Writes an integer of 0 to 2^53 - 1 in groups of seven bits, the lowest first (LEB128). */
  varint(value: number): void {
    this.#reserve(8)
    let rest = value
    while (rest >= 0x80) {
      this.#bytes[this.#length++] = (rest % 0x80) | 0x80
      rest = Math.floor(rest / 0x80)
    }
    this.#bytes[this.#length++] = rest
  }

  #reserve(more: number): void {
    if (this.#length + more <= this.#bytes.length) return
    const larger = new Uint8Array(Math.max(this.#bytes.length * 2, this.#length + more))
    larger.set(this.written)
    this.#bytes = larger
  }
}

/** Reads what a {@link ByteWriter} wrote. The bytes are untrusted. */
export class VarintReader {
  readonly #bytes: Uint8Array
  #at: number

  constructor(bytes: Uint8Array, at: number) {
    this.#bytes = bytes
    this.#at = at
  }

  /** The bytes that are left. */
  get left(): number {
    return this.#bytes.length - this.#at
  }

  /** The next integer, or NaN where the bytes end or it is above 2^53 - 1. */
  next(): number {
    let value = 0
    for (let scale = 1; scale < 2 ** 56; scale *= 0x80) {
      const byte = this.#bytes[this.#at++]
      if (byte === undefined) return Number.NaN
      value += (byte & 0x7f) * scale
      if (byte < 0x80) return Number.isSafeInteger(value) ? value : Number.NaN
    }
    return Number.NaN
  }
}
