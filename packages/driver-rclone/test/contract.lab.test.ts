import { describeDriver } from '@varve/testkit'
import { mountTmpfs, type Tmpfs } from '@varve/testkit/lab'
import { afterAll, beforeAll } from 'vitest'
import { folderTarget } from './rclone-target.ts'

const CAPACITY = 8 * 1024 * 1024

let disk: Tmpfs

beforeAll(async () => {
  disk = await mountTmpfs(`size=${CAPACITY}`)
})
afterAll(() => disk.dispose())

describeDriver('RcloneDriver on a folder', {
  capabilities: { rangeRead: true, atomicPublish: true, resume: false, parallelParts: false },
  create: () => folderTarget(),
  createFull: async () => ({ ...(await folderTarget(disk.path)), capacity: CAPACITY }),
  largeSize: 8_000_011,
  manyObjects: 16,
  turns: 2,
  timeoutMs: 240_000, // each call starts a program
})
