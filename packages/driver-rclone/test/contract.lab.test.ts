import { readdir, rm } from 'node:fs/promises'
import { join } from 'node:path'
import { type DriverTarget, describeDriver } from '@varve/testkit'
import { mountTmpfs, type Tmpfs } from '@varve/testkit/lab'
import { afterAll, beforeAll } from 'vitest'
import { folderTarget } from './rclone-target.ts'

const CAPACITY = 8 * 1024 * 1024

let disk: Tmpfs
/** Targets that have been used. Their drivers know the folder already, which saves three rclones of a dozen. */
const free: DriverTarget[] = []
const made: DriverTarget[] = []

beforeAll(async () => {
  disk = await mountTmpfs(`size=${CAPACITY}`)
})
afterAll(async () => {
  for (const target of made) await target.dispose()
  await disk.dispose()
})

async function create(): Promise<DriverTarget> {
  const used = free.pop()
  if (used) return used
  const target = await folderTarget()
  made.push(target)
  const empty = async () => {
    for (const name of await readdir(target.path)) await rm(join(target.path, name), { recursive: true })
    free.push(emptied)
  }
  const emptied: DriverTarget = { ...target, dispose: empty }
  return emptied
}

describeDriver('RcloneDriver on a folder', {
  capabilities: { rangeRead: true, atomicPublish: true, resume: false, parallelParts: false },
  create,
  createFull: async () => ({ ...(await folderTarget(disk.path)), capacity: CAPACITY }),
  largeSize: 8_000_011,
  manyObjects: 16,
  turns: 2,
  timeoutMs: 240_000, // each call starts a program
})
