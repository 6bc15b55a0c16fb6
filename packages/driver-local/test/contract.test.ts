import { describeDriver } from '@varve/testkit'
import { leaveUnfinished, localTarget, neighbour } from './local-target.ts'

describeDriver('LocalDriver', {
  capabilities: { rangeRead: true, atomicPublish: true, resume: false, parallelParts: false },
  create: localTarget,
  leaveUnfinished,
  neighbour,
  largeSize: 5_000_011,
  manyObjects: 300,
  brief: true,
})
