import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { Coverage } from '../src/coverage.ts'

describe('Coverage', () => {
  it('takes exactly the pieces that a bitmap would take', () => {
    const piece = fc.tuple(fc.nat(39), fc.integer({ min: 1, max: 12 }))
    fc.assert(
      fc.property(fc.array(piece, { maxLength: 30 }), pieces => {
        const coverage = new Coverage()
        const bitmap = new Uint8Array(64)
        for (const [start, length] of pieces) {
          const isFree = bitmap.subarray(start, start + length).every(bit => bit === 0)
          expect(coverage.add(start, start + length)).toBe(isFree)
          if (!isFree) return
          bitmap.fill(1, start, start + length)
          const reached = bitmap.indexOf(0)
          for (let size = 0; size < 64; size++) {
            const isWhole =
              bitmap.subarray(0, size).every(bit => bit === 1) &&
              bitmap.subarray(size).every(bit => bit === 0)
            if (isWhole) expect(coverage.isComplete(size)).toBe(true)
            else if (size !== reached) expect(coverage.isComplete(size)).toBe(false)
          }
        }
      }),
    )
  })

  it('is complete after the pieces of a shuffled range', () => {
    const cuts = fc.uniqueArray(fc.integer({ min: 1, max: 999 }), { maxLength: 50 })
    fc.assert(
      fc.property(cuts, fc.infiniteStream(fc.nat()), (inner, random) => {
        const ends = [0, ...inner.sort((a, b) => a - b), 1000]
        const pieces = ends.slice(1).map((end, index) => [ends[index] ?? 0, end] as const)
        const shuffled = pieces
          .map(piece => ({ piece, key: random.next().value ?? 0 }))
          .sort((a, b) => a.key - b.key)
          .map(({ piece }) => piece)
        const coverage = new Coverage()
        shuffled.forEach(([start, end], index) => {
          expect(coverage.isComplete(1000)).toBe(false)
          expect(coverage.add(start, end), `piece ${index}`).toBe(true)
        })
        expect(coverage.isComplete(1000)).toBe(true)
      }),
    )
  })

  it('refuses pieces that are scattered without end', () => {
    const coverage = new Coverage()
    let accepted = 0
    while (accepted < 100_000 && coverage.add(accepted * 2 + 1, accepted * 2 + 2)) accepted++
    expect(accepted).toBe(1024)
  })
})
