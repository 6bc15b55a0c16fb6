/**
 * Measures how long the image planner takes and how much memory it needs, each case in a process of its own:
 * plans the image, then computes every byte of its metadata in pieces of 1 MiB. Takes no arguments and prints
 * JSON.
 */
import { execFile } from 'node:child_process'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import { ExtentKind, ExtentList, planImage } from '@varve/qcow2'

const MIB = 1024 * 1024
const TIB = MIB * MIB
const CLUSTER = 65536

const CASES: Record<string, () => ExtentList> = {
  '16 TiB, a data cluster in every GiB': () => spread(16 * TIB, 16 * 1024),
  '1 TiB, 1,000,000 extents': () => spread(TIB, 500_000),
}

/** A disk with `runs` data runs at equal distances, one to eight clusters each, and nothing between. */
function spread(size: number, runs: number): ExtentList {
  const list = new ExtentList()
  const clusters = size / CLUSTER
  for (let i = 0; i < runs; i++) {
    const from = Math.floor((i * clusters) / runs)
    const next = Math.floor(((i + 1) * clusters) / runs)
    const data = Math.min(1 + (i % 8), next - from - 1)
    list.append(data * CLUSTER, ExtentKind.data)
    list.append((next - from - data) * CLUSTER, ExtentKind.unallocated)
  }
  return list
}

function measure(makeExtents: () => ExtentList): Record<string, number> {
  const baseline = process.memoryUsage().rss
  const begin = performance.now()
  const extents = makeExtents()
  const listed = performance.now()
  const layout = planImage(extents, { clusterSize: CLUSTER })
  const planned = performance.now()
  const piece = Buffer.alloc(MIB)
  for (let at = 0; at < layout.dataStart; at += MIB)
    layout.readMetadata(at, piece.subarray(0, Math.min(MIB, layout.dataStart - at)))
  const written = performance.now()
  const { heapUsed, arrayBuffers } = process.memoryUsage()
  return {
    extents: extents.count,
    metadataMiB: round(layout.dataStart / MIB),
    listSeconds: round((listed - begin) / 1000),
    planSeconds: round((planned - listed) / 1000),
    metadataSeconds: round((written - planned) / 1000),
    baselineMiB: round(baseline / MIB),
    peakMiB: round(process.resourceUsage().maxRSS / 1024),
    heapMiB: round(heapUsed / MIB),
    arrayBuffersMiB: round(arrayBuffers / MIB),
  }
}

function round(value: number): number {
  return Math.round(value * 1000) / 1000
}

const chosen = process.argv[2] // given to the children only
if (chosen === undefined) {
  const results: Record<string, unknown> = {}
  for (const name of Object.keys(CASES)) {
    const child = [...process.execArgv, fileURLToPath(import.meta.url), name]
    const { stdout } = await promisify(execFile)(process.execPath, child, { timeout: 120_000 })
    results[name] = JSON.parse(stdout)
  }
  console.log(JSON.stringify(results, undefined, 2))
} else {
  const makeExtents = CASES[chosen]
  if (!makeExtents) throw new Error(`No such case: ${chosen}`)
  console.log(JSON.stringify(measure(makeExtents)))
}
