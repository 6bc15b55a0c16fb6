import { ENTRY_BYTES } from './format.ts'

/** Writes `count` entries, from entry `first` of a table on, to the start of `view`, which is all zeros. */
export type EntryWriter = (view: DataView, first: number, count: number) => void

/** Writes the bytes of a table of 8-byte entries from byte `position` on; `into` is all zeros. */
export function writeTable(position: number, into: Uint8Array, write: EntryWriter): void {
  const head = Math.min((ENTRY_BYTES - (position % ENTRY_BYTES)) % ENTRY_BYTES, into.length)
  const count = Math.floor((into.length - head) / ENTRY_BYTES)
  const tail = head + count * ENTRY_BYTES
  if (head > 0) writePart(position, into.subarray(0, head), write)
  if (count > 0) write(viewOf(into.subarray(head, tail)), (position + head) / ENTRY_BYTES, count)
  if (tail < into.length) writePart(position + tail, into.subarray(tail), write)
}

/** Writes an entry of a table: a file offset, with flags in the upper half. */
export function writeEntry(view: DataView, at: number, offset: number, high: number): void {
  view.setUint32(at, (high | (offset / 0x1_0000_0000)) >>> 0)
  view.setUint32(at + 4, offset >>> 0)
}

function writePart(position: number, into: Uint8Array, write: EntryWriter): void {
  const entry = new Uint8Array(ENTRY_BYTES)
  write(viewOf(entry), Math.floor(position / ENTRY_BYTES), 1)
  const from = position % ENTRY_BYTES
  into.set(entry.subarray(from, from + into.length))
}

function viewOf(bytes: Uint8Array): DataView {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)
}
