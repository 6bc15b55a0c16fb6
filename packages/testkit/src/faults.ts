import { Transform } from 'node:stream'
import { setTimeout as sleep } from 'node:timers/promises'
import { abortError } from '@varve/core'

/**
 * What goes wrong with a call:
 *
 * - `fail-before`: it fails and had no effect.
 * - `fail-after`: it does its work, and then fails: an answer that got lost.
 * - `stall`: nothing happens until the call is given up.
 * - `late`: it does its work, and answers only so many milliseconds later; it fails where it is given up before.
 *
 * With the bytes of an object. An upload's bytes are changed before they are stored, so the storage then holds
 * them; a download's are changed on their way:
 *
 * - `fail-at`: they fail at an offset: a full disk, a connection that breaks.
 * - `stall-at`: nothing more comes until the call is given up.
 * - `end-at`: they end early, as if that were all.
 * - `append`: more bytes follow, all zero.
 * - `flip-bit`: one bit of them is another.
 *
 * With what is told of an object:
 *
 * - `resize`: `stat`, `list` or `put` tells a size that differs by so many bytes.
 * - `stale`: `list` does not know the last so many changes that went through the driver: what they stored is missing, and
 *   what they deleted is still shown. An eventually consistent listing.
 */
export type Fault =
  | { readonly kind: 'fail-before'; readonly error: Error }
  | { readonly kind: 'fail-after'; readonly error: Error }
  | { readonly kind: 'stall' }
  | { readonly kind: 'late'; readonly ms: number }
  | { readonly kind: 'fail-at'; readonly offset: number; readonly error: Error }
  | { readonly kind: 'stall-at'; readonly offset: number }
  | { readonly kind: 'end-at'; readonly offset: number }
  | { readonly kind: 'append'; readonly bytes: number }
  | { readonly kind: 'flip-bit'; readonly offset: number; readonly bit?: number }
  | { readonly kind: 'resize'; readonly by: number }
  | { readonly kind: 'stale'; readonly changes: number }

const BYTES_FAULTS: ReadonlySet<Fault['kind']> = new Set([
  'fail-at',
  'stall-at',
  'end-at',
  'append',
  'flip-bit',
])

/** A fault of an object's bytes. */
export type BytesFault = Extract<Fault, { kind: 'fail-at' | 'stall-at' | 'end-at' | 'append' | 'flip-bit' }>

/** Whether a fault is one of an object's bytes. */
export function isBytesFault(fault: Fault | undefined): fault is BytesFault {
  return fault !== undefined && BYTES_FAULTS.has(fault.kind)
}

/**
 * Passes bytes on with a fault in them.
 *
 * @param start the offset in the object of the first byte that passes
 */
export function bytesWithFault(fault: BytesFault, start = 0): Transform {
  let position = start
  return new Transform({
    transform(chunk: Uint8Array, _encoding, done) {
      const begin = position
      position += chunk.byteLength
      switch (fault.kind) {
        case 'fail-at':
          if (position <= fault.offset) return done(null, chunk)
          this.push(chunk.subarray(0, Math.max(0, fault.offset - begin)))
          return done(fault.error)
        case 'stall-at':
          if (position <= fault.offset) return done(null, chunk)
          this.push(chunk.subarray(0, Math.max(0, fault.offset - begin)))
          return // never done
        case 'end-at':
          return done(null, chunk.subarray(0, Math.max(0, fault.offset - begin)))
        case 'flip-bit':
          return done(
            null,
            begin <= fault.offset && fault.offset < position ? flip(chunk, fault, begin) : chunk,
          )
        case 'append':
          return done(null, chunk)
      }
    },
    flush(done) {
      if (fault.kind === 'append') return done(null, Buffer.alloc(fault.bytes))
      const atEnd = 'offset' in fault && fault.offset === position
      if (fault.kind === 'fail-at' && atEnd) return done(fault.error)
      if (fault.kind === 'stall-at' && atEnd) return // never done
      done()
    },
  })
}

function flip(
  chunk: Uint8Array,
  { offset, bit = 0 }: Extract<Fault, { kind: 'flip-bit' }>,
  begin: number,
): Uint8Array {
  const changed = Buffer.from(chunk)
  changed.writeUInt8(changed.readUInt8(offset - begin) ^ (1 << bit), offset - begin)
  return changed
}

/** Resolves never; rejects with `ABORTED` when the call is given up. */
export function stalled(signal: AbortSignal | undefined): Promise<never> {
  return new Promise((_, reject) => {
    if (signal?.aborted) reject(abortError(signal))
    signal?.addEventListener('abort', () => reject(abortError(signal)), { once: true })
  })
}

/** Resolves after so many milliseconds; rejects with `ABORTED` when the call is given up before. */
export async function delayed(ms: number, signal: AbortSignal | undefined): Promise<void> {
  try {
    await sleep(ms, undefined, signal ? { signal } : {})
  } catch {
    if (signal) throw abortError(signal)
  }
}
