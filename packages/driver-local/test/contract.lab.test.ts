import { describeDriver } from '@varve/testkit'
import { mountTmpfs } from '@varve/testkit/lab'
import { leaveUnfinished, localTarget, neighbour } from './local-target.ts'

const CAPACITY = 8 * 1024 * 1024

describeDriver('LocalDriver, with a disk that fills up,', {
  capabilities: { rangeRead: true, atomicPublish: true, resume: false, parallelParts: false },
  create: localTarget,
  leaveUnfinished,
  neighbour,
  parts: ['storage'], // the others are tried on any folder, as a unit
  async createFull() {
    const disk = await mountTmpfs(`size=${CAPACITY}`)
    const target = await localTarget(disk.path)
    const dispose = async () => {
      await target.dispose()
      await disk.dispose()
    }
    return { ...target, dispose, capacity: CAPACITY }
  },
})
