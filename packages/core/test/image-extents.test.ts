import { ExtentKind } from '@varve/qcow2'
import fc from 'fast-check'
import { expect, test } from 'vitest'
import { DataMapWriter, decodeDataMap, LostData, type Runs } from '../src/data-map.ts'
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

function forEach(map: Runs, visit: (start: number, end: number, flags: number) => void): void {
  for (let i = 0; i < map.count; i++) visit(map.start(i), map.start(i) + map.length(i), map.flags(i))
}

function dataMapOf(units: readonly number[]) {
  const writer = new DataMapWriter(units.length * UNIT, 2 ** 20)
  forEach(mapOf(units), (...extent) => writer.append(...extent))
  return decodeDataMap(writer.finish() ?? Buffer.alloc(0))
}

/** What the client gives for whole clusters: data, or dirty, if any part is. */
function roundedTo(units: readonly number[], join: (one: number, other: number) => number): number[] {
  const each = CLUSTER / UNIT
  return units.map((_, unit) => {
    const first = unit - (unit % each)
    return units.slice(first, first + each).reduce((one, other) => join(one, other))
  })
}

/** What each unit is, in runs: some within a cluster, some of many clusters. */
function runsOf(units: number, ...flags: number[]): fc.Arbitrary<number[]> {
  const length = fc.oneof(fc.integer({ min: 1, max: 5 }), fc.integer({ min: 1, max: 80 }))
  return fc.array(fc.tuple(length, fc.constantFrom(...flags)), { minLength: 1, maxLength: 30 }).map(runs => {
    const all = runs.flatMap(([length, flag]) => Array<number>(length).fill(flag))
    return Array.from({ length: units }, (_, unit) => all[unit % all.length] ?? 0)
  })
}

const disk = fc.integer({ min: 1, max: 400 }).chain(units =>
  fc.record({
    // base:allocation: 0 data, 1 hole with undefined content, 2 zero, 3 hole and zero
    allocation: runsOf(units, 0, 0, 1, 2, 3, 3),
    dirty: runsOf(units, 0, 0, 1),
    parentUnits: fc.integer({ min: 0, max: units }),
    before: fc.option(runsOf(units, 0, 1, 2, 3)),
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
    fc.property(disk, fc.boolean(), ({ allocation }, isRounded) => {
      const extents = imageExtents({
        size: allocation.length * UNIT,
        clusterSize: CLUSTER,
        allocation: mapOf(isRounded ? roundedTo(allocation, (one, other) => one & other) : allocation),
      })
      expect(extents.size).toBe(allocation.length * UNIT)
      expect(clustersOf(extents)).toEqual(expected(allocation, () => true, true))
    }),
  )
})

test('an increment holds dirty data, dirty zeros and lost data explicitly, all that lies beyond the parent, and nothing else', () => {
  fc.assert(
    fc.property(disk, fc.boolean(), ({ allocation, dirty, parentUnits, before }, isRounded) => {
      // A grown region is clean in the bitmap.
      const bitmap = dirty.map((flag, unit) => (unit < parentUnits ? flag : 0))
      const size = parentUnits * UNIT
      const lost = new LostData(before ? dataMapOf(before.slice(0, parentUnits)) : undefined, size, CLUSTER)
      forEach(mapOf(allocation), (...extent) => lost.append(...extent))
      const extents = imageExtents({
        size: allocation.length * UNIT,
        clusterSize: CLUSTER,
        allocation: mapOf(isRounded ? roundedTo(allocation, (one, other) => one & other) : allocation),
        since: {
          dirty: mapOf(isRounded ? roundedTo(bitmap, (one, other) => one | other) : bitmap),
          size,
          lost: lost.ranges,
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
