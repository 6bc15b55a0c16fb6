// Plans one image and composes parts of it in a process of its own, and prints the most memory that this took, in MiB.
import { ComposedImage, ExtentKind, ExtentList, planImage } from '../src/index.ts'

const MIB = 2 ** 20
const TIB = 2 ** 40
const CLUSTER = 65_536
const PARTS = 64

/** A disk with runs of data at equal distances and nothing between. */
function spread(size: number, runs: number): ExtentList {
  const list = new ExtentList()
  const distance = Math.floor(size / CLUSTER / runs) * CLUSTER
  for (let run = 0; run < runs; run++) {
    const data = (1 + (run % 8)) * CLUSTER
    list.append(data, ExtentKind.data)
    list.append(distance - data, ExtentKind.unallocated)
  }
  list.append(size - list.size, ExtentKind.unallocated)
  return list
}

const DISKS: Readonly<Record<string, () => ExtentList>> = {
  sparse: () => spread(16 * TIB, 16 * 1024),
  extents: () => spread(TIB, 500_000),
}

const extents = DISKS[process.argv[2] ?? '']?.()
if (extents) {
  const layout = planImage(extents, { clusterSize: CLUSTER })
  const image = new ComposedImage(layout, { read: async (_offset, into) => void into.fill(1) })
  // All of the metadata, and data from the whole length of the file.
  const piece = Buffer.alloc(MIB)
  for (let at = 0; at < layout.dataStart; at += MIB)
    await image.read(at, piece.subarray(0, Math.min(MIB, layout.dataStart - at)))
  for (let part = 0; part < PARTS; part++)
    await image.read(Math.floor((part / PARTS) * (layout.fileSize - MIB)), piece)
}
console.log(JSON.stringify({ count: extents?.count ?? 0, peakMiB: process.resourceUsage().maxRSS / 1024 }))
