import { endianness } from 'node:os'

const isLittleEndian = endianness() === 'LE'

/**
 * Bytes that depend on a seed and on their own offset alone, so that any range of them can be made, and
 * checked, without the rest: a byte that is lost, doubled or moved does not go unnoticed.
 */
export function patternBytes(seed: number, start: number, length: number): Buffer {
  const bytes = Buffer.allocUnsafeSlow(length)
  fillPattern(bytes, seed, start)
  return bytes
}

/** Fills memory with the bytes of {@link patternBytes} from offset `start` on. */
export function fillPattern(into: Uint8Array, seed: number, start: number): void {
  const key = Math.imul(seed + 1, 0x9e3779b1)
  let at = 0
  const single = () => {
    const offset = start + at
    into[at++] = mix(key, Math.floor(offset / 4)) >>> (8 * (offset % 4))
  }
  while (at < into.length && (start + at) % 4 !== 0) single()
  const first = (start + at) / 4
  const words = Math.floor((into.length - at) / 4)
  if (isLittleEndian && (into.byteOffset + at) % 4 === 0) {
    const aligned = new Uint32Array(into.buffer, into.byteOffset + at, words) // several times as fast
    for (let word = 0; word < words; word++) aligned[word] = mix(key, first + word)
  } else {
    const view = new DataView(into.buffer, into.byteOffset + at, 4 * words)
    for (let word = 0; word < words; word++) view.setUint32(4 * word, mix(key, first + word), true)
  }
  at += 4 * words
  while (at < into.length) single()
}

/** A round of MurmurHash3's 32-bit mixing. */
function mix(key: number, index: number): number {
  let h = Math.imul(index ^ key, 0x85ebca6b)
  h = Math.imul(h ^ (h >>> 13), 0xc2b2ae35)
  return (h ^ (h >>> 16)) >>> 0
}
