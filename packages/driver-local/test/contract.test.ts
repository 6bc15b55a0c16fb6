import { describeDriver } from '@varve/testkit'
import { localTarget } from './local-target.ts'

describeDriver('LocalDriver', {
  capabilities: { rangeRead: true, atomicPublish: true, resume: false, parallelParts: false },
  create: localTarget,
  largeSize: 5_000_011,
  manyObjects: 300,
})
