import { describeDriver } from '@varve/testkit'
import { folderTarget } from './rclone-target.ts'

describeDriver('RcloneDriver on a folder', {
  capabilities: { rangeRead: true, atomicPublish: true, resume: false, parallelParts: false },
  create: folderTarget,
  largeSize: 8_000_011,
  manyObjects: 16,
  turns: 2,
  timeoutMs: 240_000, // each call starts a program
})
