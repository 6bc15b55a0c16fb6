import { ExtentKind, type RbdDiff } from '@varve/core'
import fc from 'fast-check'

/** A record of data or zeros. */
export interface ModelRecord {
  readonly start: number
  readonly length: number
  readonly isData: boolean
}

/** What a stream is to hold. */
export interface ModelDiff {
  readonly from: string | undefined
  readonly to: string
  readonly size: number
  readonly records: readonly ModelRecord[]
}

const names = fc.string({ unit: 'binary', minLength: 1, maxLength: 40 })

/** Diffs with short records, at any bytes of an image. */
export const diffs: fc.Arbitrary<ModelDiff> = fc
  .record({
    from: fc.option(names, { nil: undefined }),
    to: names,
    steps: fc.array(
      fc.record({ gap: fc.nat(700), length: fc.integer({ min: 1, max: 300 }), isData: fc.boolean() }),
      { maxLength: 60 },
    ),
    tail: fc.nat(500),
  })
  .map(({ from, to, steps, tail }) => {
    let end = 0
    const records = steps.map(({ gap, length, isData }) => {
      const start = end + gap
      end = start + length
      return { start, length, isData }
    })
    return { from, to, size: end + tail, records }
  })

/** The byte that a record's data has at `position` of the image; never 0. */
export function patternByte(position: number): number {
  return 1 + (position % 251)
}

function le(bytes: 4 | 8, value: number): Buffer {
  const buffer = Buffer.alloc(bytes)
  if (bytes === 4) buffer.writeUInt32LE(value)
  else buffer.writeBigUInt64LE(BigInt(value))
  return buffer
}

/** A named record, `f` or `t`. */
export function nameRecord(tag: 'f' | 't', name: string): Buffer {
  const bytes = Buffer.from(name)
  return Buffer.concat([Buffer.from(tag), le(4, bytes.length), bytes])
}

/** The record of the image's size. */
export function sizeRecord(size: number): Buffer {
  return Buffer.concat([Buffer.from('s'), le(8, size)])
}

/** A record of data, without the data, or of zeros. */
export function rangeRecord(tag: 'w' | 'z', start: number, length: number): Buffer {
  return Buffer.concat([Buffer.from(tag), le(8, start), le(8, length)])
}

/** The bytes of a stream, as the format's description has them. */
export function streamBytes({ from, to, size, records }: ModelDiff): Buffer {
  return Buffer.concat([
    Buffer.from('rbd diff v1\n'),
    ...(from === undefined ? [] : [nameRecord('f', from)]),
    nameRecord('t', to),
    sizeRecord(size),
    ...records.flatMap(({ start, length, isData }) => [
      rangeRecord(isData ? 'w' : 'z', start, length),
      ...(isData ? [Buffer.from(Array.from({ length }, (_, i) => patternByte(start + i)))] : []),
    ]),
    Buffer.from('e'),
  ])
}

/** `parent` after what a stream holds, read by the places that its diff tells. */
export function applyDiff(diff: RbdDiff, stream: Uint8Array, parent: Uint8Array): Buffer {
  const disk = Buffer.alloc(diff.size)
  disk.set(parent.subarray(0, diff.size))
  const { extents } = diff
  for (let i = 0, position = 0; i < extents.count; i++) {
    if (extents.start(i) !== position) throw new Error(`a gap before run ${i}`)
    position += extents.length(i)
    const at = extents.fileOffset(i)
    if (extents.kind(i) === ExtentKind.zero) disk.fill(0, extents.start(i), position)
    if (extents.kind(i) === ExtentKind.data)
      disk.set(stream.subarray(at, at + extents.length(i)), extents.start(i))
    if (i === extents.count - 1 && position !== diff.size) throw new Error('the end is not covered')
  }
  return disk
}
