import { expect, test } from 'vitest'
import { ExtentKind, ExtentList, type ImageFile, openImage, planImage } from '../src/index.ts'
import { BACKING } from './chain-model.ts'

const TABLE = 2 ** 21

// Apart from the other tests of what is refused, as it takes seconds.
test('tables that change at every cluster are refused at the run after the 2^24th', async () => {
  const tables = 65 // of 2^18 entries
  const extents = new ExtentList()
  for (let i = 0; i < tables; i++) {
    extents.append(TABLE, ExtentKind.zero)
    extents.append(TABLE * (TABLE / 8) - TABLE, ExtentKind.unallocated)
  }
  const layout = planImage(extents, { clusterSize: TABLE, backing: BACKING })
  const firstTable = layout.fileSize - tables * TABLE
  const file: ImageFile = {
    size: layout.fileSize,
    async read(offset, into) {
      layout.readMetadata(offset, into)
      // every other cluster reads as zeros, and the rest as the backing file
      if (offset >= firstTable) for (let at = 7; at < into.length; at += 16) into[at] = 1
    },
  }
  // no caller can ask for more
  await expect(openImage(file, { maxRuns: 2 ** 25 })).rejects.toMatchObject({
    name: 'Qcow2Error',
    code: 'QCOW2_UNSUPPORTED',
    context: { runs: 2 ** 24 },
  })
})
