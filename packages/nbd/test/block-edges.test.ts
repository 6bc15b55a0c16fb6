import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { splitAtBlocks } from '../src/block-edges.ts'

describe('splitAtBlocks', () => {
  it('covers the range exactly once, with whole blocks in the middle and a part of one block at each edge', () => {
    const input = fc
      .tuple(fc.constantFrom(1, 2, 8, 16), fc.integer({ min: 1, max: 100 }))
      .chain(([block, size]) => fc.tuple(fc.constant(block), fc.constant(size), fc.nat(size), fc.nat(size)))
    fc.assert(
      fc.property(input, ([block, size, a, b]) => {
        const [start, end] = [Math.min(a, b), Math.max(a, b)]
        const { aligned, edges } = splitAtBlocks(start, end, block, size)
        const times = new Uint8Array(size)
        for (let at = aligned.start; at < aligned.end; at++) times[at] = (times[at] ?? 0) + 1
        for (const edge of edges) {
          expect(edge.block % block).toBe(0)
          expect(edge.start).toBeGreaterThanOrEqual(edge.block)
          expect(edge.end).toBeLessThanOrEqual(edge.block + block)
          for (let at = edge.start; at < edge.end; at++) times[at] = (times[at] ?? 0) + 1
        }
        expect([...times]).toEqual(Array.from({ length: size }, (_, at) => (at >= start && at < end ? 1 : 0)))
        if (aligned.start < aligned.end) {
          expect(aligned.start % block).toBe(0)
          expect(aligned.end === size || aligned.end % block === 0).toBe(true)
        }
        expect(edges.length).toBeLessThanOrEqual(2)
      }),
    )
  })
})
