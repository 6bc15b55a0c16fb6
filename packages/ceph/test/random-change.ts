import type { Random } from '../../core/test/torture/random.ts'

/** One change of a disk: a command for `qemu-io`, done to the bytes as well. */
export function randomChange(content: Buffer, random: Random): string {
  const units = content.byteLength / 512
  const start = random.below(units)
  const length = Math.min(1 + random.below(random.oneIn(2) ? 16 : 2500), units - start)
  const [offset, bytes] = [start * 512, length * 512]
  const kind = random.pick(['write', 'write', 'zero', 'discard'])
  const byte = kind === 'write' ? 1 + random.below(255) : 0
  // What is discarded reads as zeros from whole blocks on only.
  const first = kind === 'discard' ? Math.ceil(offset / 65_536) * 65_536 : offset
  const end = kind === 'discard' ? Math.floor((offset + bytes) / 65_536) * 65_536 : offset + bytes
  if (end <= first) return randomChange(content, random)
  content.fill(byte, first, end)
  if (kind === 'write') return `write -P ${byte} ${first} ${end - first}`
  return `${kind === 'zero' ? 'write -z' : 'discard'} ${first} ${end - first}`
}
