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
  const view = new DataView(into.buffer, into.byteOffset, into.byteLength)
  let at = 0
  const single = () => {
    const offset = start + at
    into[at++] = mix(key, Math.floor(offset / 4)) >>> (8 * (offset % 4))
  }
  while (at < into.length && (start + at) % 4 !== 0) single()
  for (let index = (start + at) / 4; at + 4 <= into.length; at += 4, index++) {
    view.setUint32(at, mix(key, index), true)
  }
  while (at < into.length) single()
}

/** A round of MurmurHash3's 32-bit mixing. */
function mix(key: number, index: number): number {
  let h = Math.imul(index ^ key, 0x85ebca6b)
  h = Math.imul(h ^ (h >>> 13), 0xc2b2ae35)
  return (h ^ (h >>> 16)) >>> 0
}
