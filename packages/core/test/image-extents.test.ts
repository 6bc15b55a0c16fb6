import { ExtentKind } from '@varve/qcow2'
import fc from 'fast-check'
import { expect, test } from 'vitest'
import { dataMap, lostData } from '../src/data-map.ts'
import { imageExtents } from '../src/image-extents.ts'

const UNIT = 512
const CLUSTER = 4096

/** A map as the NBD client gives it: equal neighbours joined, covering the whole disk. */
function mapOf(units: readonly number[]) {
  const runs: { start: number; length: number; flags: number }[] = []
  units.forEach((flags, i) => {
    const last = runs.at(-1)
    if (last?.flags === flags) last.length += UNIT
    else runs.push({ start: i * UNIT, length: UNIT, flags })
  })
  const run = (i: number) => runs[i] ?? { start: Number.NaN, length: Number.NaN, flags: Number.NaN }
  return {
    count: runs.length,
    start: (i: number) => run(i).start,
    length: (i: number) => run(i).length,
    flags: (i: number) => run(i).flags,
  }
}

const disk = fc.integer({ min: 1, max: 100 }).chain(units =>
  fc.record({
    // base:allocation: 0 data, 1 hole with undefined content, 2 zero, 3 hole and zero
    allocation: fc.array(fc.constantFrom(0, 0, 1, 2, 3, 3), { minLength: units, maxLength: units }),
    dirty: fc.array(fc.constantFrom(0, 0, 1), { minLength: units, maxLength: units }),
    parentUnits: fc.integer({ min: 0, max: units }),
    before: fc.option(fc.array(fc.constantFrom(0, 1, 2, 3), { minLength: units, maxLength: units })),
  }),
)

/** What a cluster must be, looked at unit by unit. */
function expected(allocation: number[], changed: (unit: number) => boolean, full: boolean): number[] {
  const clusters: number[] = []
  for (let first = 0; first < allocation.length; first += CLUSTER / UNIT) {
    const units = allocation.map((_, i) => i).slice(first, first + CLUSTER / UNIT)
    const data = units.some(unit => ((allocation[unit] ?? 0) & 2) === 0)
    if (full) clusters.push(data ? ExtentKind.data : ExtentKind.unallocated)
    else if (!units.some(changed)) clusters.push(ExtentKind.unallocated)
    else clusters.push(data ? ExtentKind.data : ExtentKind.zero)
  }
  return clusters
}

function clustersOf(extents: ReturnType<typeof imageExtents>): number[] {
  const clusters: number[] = []
  for (let i = 0; i < extents.count; i++) {
    expect(extents.start(i) % CLUSTER).toBe(0)
    for (let at = 0; at < extents.length(i); at += CLUSTER) clusters.push(extents.kind(i))
  }
  return clusters
}

test('a full image stores every cluster that has data in it and leaves out the ones that read as zero', () => {
  fc.assert(
    fc.property(disk, ({ allocation }) => {
      const extents = imageExtents({
        size: allocation.length * UNIT,
        clusterSize: CLUSTER,
        allocation: mapOf(allocation),
      })
      expect(extents.size).toBe(allocation.length * UNIT)
      expect(clustersOf(extents)).toEqual(expected(allocation, () => true, true))
    }),
  )
})

test('an increment holds dirty data, dirty zeros and lost data explicitly, all that lies beyond the parent, and nothing else', () => {
  fc.assert(
    fc.property(disk, ({ allocation, dirty, parentUnits, before }) => {
      // A grown region is clean in the bitmap.
      const bitmap = dirty.map((flag, unit) => (unit < parentUnits ? flag : 0))
      const size = parentUnits * UNIT
      const map = before && dataMap(mapOf(before.slice(0, parentUnits)), size)
      const extents = imageExtents({
        size: allocation.length * UNIT,
        clusterSize: CLUSTER,
        allocation: mapOf(allocation),
        since: {
          dirty: mapOf(bitmap),
          size,
          lost: lostData(map ?? undefined, mapOf(allocation), size),
        },
      })
      const readsZero = (unit: number) => ((allocation[unit] ?? 0) & 2) !== 0
      const hadData = (unit: number) => !before || ((before[unit] ?? 0) & 2) === 0
      const changed = (unit: number) =>
        unit >= parentUnits || bitmap[unit] === 1 || (readsZero(unit) && hadData(unit))
      expect(clustersOf(extents)).toEqual(expected(allocation, changed, false))
    }),
  )
})
