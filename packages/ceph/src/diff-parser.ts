import { ExtentKind, ImageExtents, RBD_DIFF_LIMITS, type RbdDiff, VarveError } from '@varve/core'
import { BANNER, Tag } from './diff-format.ts'

const banner = new TextEncoder().encode(BANNER)

/** The bytes of each part of a record, but of a name. */
const FIELD_BYTES = {
  banner: banner.length,
  tag: 1,
  range: 16,
  size: 8,
  nameLength: 4,
} as const

/** What the bytes that are being gathered will be. */
type Field = keyof typeof FIELD_BYTES | 'name'

/**
 * Reads a stream of `rbd export-diff` as it passes by, in pieces of any size. Data is skipped, not kept; what is kept
 * of each record is 16 bytes, or twice that beside a gap.
 *
 * The stream is untrusted. Refused with `RBD_STREAM_INVALID` is whatever `rbd` does not write: other versions,
 * records that are not known or come twice, ranges that go back, overlap or leave the image, lengths that cannot be,
 * no name of a snapshot to lead to, bytes after the end mark, and a stream without one. One with more than 2^25
 * runs is refused with `DISK_UNSUPPORTED`, so that no stream takes more than 512 MiB of memory.
 */
export class DiffParser {
  readonly #extents = new ImageExtents()
  /** Bytes of a field that may come in several pieces. */
  readonly #held = new Uint8Array(RBD_DIFF_LIMITS.nameBytes)
  readonly #view = new DataView(this.#held.buffer)
  #heldBytes = 0
  #needed: number = banner.length
  #field: Field = 'banner'
  #tag = 0
  #nameLength = 0
  /** Bytes of the stream that were seen. */
  #position = 0
  #dataLeft = 0
  #dataSize = 0
  #ended = false
  /** The first byte of the image that is in no run yet. */
  #covered = 0
  #size: number | undefined
  #fromSnapshot: string | undefined
  #toSnapshot: string | undefined

  /** The first byte of the image that no record has told of so far. */
  get position(): number {
    return this.#covered
  }

  /** Takes the next piece of the stream. @throws RBD_STREAM_INVALID, DISK_UNSUPPORTED */
  push(piece: Uint8Array): void {
    for (let at = 0; at < piece.length; ) {
      if (this.#dataLeft > 0) {
        const skipped = Math.min(this.#dataLeft, piece.length - at)
        this.#dataLeft -= skipped
        this.#position += skipped
        at += skipped
        continue
      }
      if (this.#ended) throw this.#invalid('goes on after its end mark')
      const end = Math.min(piece.length, at + this.#needed - this.#heldBytes)
      this.#position += end - at
      while (at < end) this.#held[this.#heldBytes++] = piece[at++] ?? 0
      if (this.#heldBytes < this.#needed) return
      this.#field = this.#take()
      this.#needed = this.#field === 'name' ? this.#nameLength : FIELD_BYTES[this.#field]
      this.#heldBytes = 0
    }
  }

  /** What the whole stream holds; there is no more of it. @throws RBD_STREAM_INVALID */
  finish(): RbdDiff {
    if (!this.#ended) throw this.#invalid('breaks off before its end mark: it is cut short')
    const toSnapshot = this.#toSnapshot
    if (toSnapshot === undefined) throw this.#invalid('names no snapshot that it leads to')
    const size = this.#imageSize()
    this.#cover(size, ExtentKind.unallocated)
    return {
      ...(this.#fromSnapshot !== undefined && { fromSnapshot: this.#fromSnapshot }),
      toSnapshot,
      size,
      streamSize: this.#position,
      dataSize: this.#dataSize,
      extents: this.#extents,
    }
  }

  /** Takes the field that is whole now, and tells which one follows. */
  #take(): Field {
    switch (this.#field) {
      case 'banner':
        if (!banner.every((byte, i) => byte === this.#held[i])) throw this.#notABanner()
        return 'tag'
      case 'tag':
        this.#tag = this.#held[0] ?? 0
        return this.#takeTag()
      case 'nameLength':
        this.#nameLength = this.#view.getUint32(0, true)
        if (this.#nameLength === 0 || this.#nameLength > RBD_DIFF_LIMITS.nameBytes)
          throw this.#invalid(`has a snapshot's name of ${this.#nameLength} bytes`)
        return 'name'
      case 'name':
        this.#takeName()
        return 'tag'
      case 'size':
        this.#size = this.#number(0)
        return 'tag'
      case 'range':
        this.#takeRange()
        return 'tag'
    }
  }

  #takeTag(): Field {
    switch (this.#tag) {
      case Tag.from:
      case Tag.to: {
        const known = this.#tag === Tag.from ? this.#fromSnapshot : this.#toSnapshot
        if (known !== undefined) throw this.#invalid('names a snapshot twice')
        return 'nameLength'
      }
      case Tag.size:
        if (this.#size !== undefined) throw this.#invalid("has the image's size twice")
        return 'size'
      case Tag.write:
      case Tag.zero:
        this.#imageSize()
        return 'range'
      case Tag.end:
        this.#imageSize()
        this.#ended = true
        return 'tag'
      default:
        throw this.#invalid(`has a record of the kind 0x${this.#tag.toString(16)}, which is none`)
    }
  }

  #takeName(): void {
    const name = this.#decodeName()
    if (this.#tag === Tag.from) this.#fromSnapshot = name
    else this.#toSnapshot = name
  }

  #takeRange(): void {
    const start = this.#number(0)
    const length = this.#number(8)
    const size = this.#imageSize()
    if (start < this.#covered)
      throw this.#invalid(`has a range at ${start} after one that ends at ${this.#covered}`)
    if (length > size - start)
      throw this.#invalid(`has a range at ${start} of ${length} bytes in an image of ${size} bytes`)
    if (length > 0) {
      this.#cover(start, ExtentKind.unallocated)
      this.#cover(start + length, this.#tag === Tag.write ? ExtentKind.data : ExtentKind.zero)
    }
    if (this.#tag === Tag.write) {
      this.#dataLeft = length
      this.#dataSize += length
    }
  }

  #cover(end: number, kind: ExtentKind): void {
    if (end === this.#covered) return
    if (this.#extents.count >= RBD_DIFF_LIMITS.runs) {
      throw new VarveError(
        'DISK_UNSUPPORTED',
        `The image has changed in more than ${RBD_DIFF_LIMITS.runs} places. Take a full backup.`,
        { context: { runs: RBD_DIFF_LIMITS.runs } },
      )
    }
    this.#extents.append(end - this.#covered, kind, this.#position)
    this.#covered = end
  }

  #imageSize(): number {
    if (this.#size === undefined) throw this.#invalid("does not begin with the image's size")
    return this.#size
  }

  #number(at: number): number {
    const value = this.#view.getUint32(at + 4, true) * 2 ** 32 + this.#view.getUint32(at, true)
    if (value > RBD_DIFF_LIMITS.imageBytes) throw this.#invalid('has a size or an offset above 2^52')
    return value
  }

  #decodeName(): string {
    try {
      return new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(
        this.#held.subarray(0, this.#heldBytes),
      )
    } catch {
      throw this.#invalid("has a snapshot's name that is no UTF-8")
    }
  }

  #notABanner(): VarveError {
    const text = Buffer.from(this.#held.subarray(0, banner.length)).toString('latin1')
    return /^rbd (diff|image) v2\n/.test(text)
      ? this.#invalid('is of version 2, which only `rbd export --export-format 2` writes')
      : this.#invalid(`does not begin with ${JSON.stringify(BANNER)}`)
  }

  #invalid(what: string): VarveError {
    return new VarveError(
      'RBD_STREAM_INVALID',
      `The RBD diff stream ${what} (at byte ${this.#position}). It cannot be used: take the backup again, or use another copy of it.`,
      { context: { position: this.#position } },
    )
  }
}
