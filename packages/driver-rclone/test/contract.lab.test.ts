import { mkdir, readdir, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { RcloneDriver } from '@varve/driver-rclone'
import { describeDriver } from '@varve/testkit'
import { mountTmpfs, type Tmpfs } from '@varve/testkit/lab'
import { isThorough } from '@varve/testkit/thorough'
import { afterAll, beforeAll } from 'vitest'
import { type FolderTarget, fillFolder, folderTarget } from './rclone-target.ts'

const CAPACITY = 8 * 1024 * 1024

let disk: Tmpfs
/** Targets that have been used, by their roots. Their drivers know the folder already, which saves three rclones of a dozen. */
const free = new Map<string | undefined, FolderTarget>()
const made: FolderTarget[] = []

beforeAll(async () => {
  disk = await mountTmpfs(`size=${CAPACITY}`)
})
afterAll(async () => {
  for (const target of made) await target.dispose()
  await disk.dispose()
})

async function create(root?: string): Promise<FolderTarget> {
  const used = free.get(root)
  free.delete(root)
  if (used) return used
  const target = await folderTarget(root)
  made.push(target)
  const empty = async () => {
    for (const name of await readdir(target.path)) await rm(join(target.path, name), { recursive: true })
    free.set(root, emptied)
  }
  const emptied: FolderTarget = { ...target, dispose: empty }
  return emptied
}

describeDriver('RcloneDriver on a folder', {
  capabilities: { rangeRead: true, atomicPublish: true, resume: false, parallelParts: false },
  create: () => create(),
  async leaveUnfinished({ path }) {
    await mkdir(join(path, 'killed'))
    await writeFile(join(path, 'killed/.varve-part-0123456789abcdef'), 'half')
  },
  async neighbour({ path, configFile }) {
    await mkdir(`${path}2`)
    return new RcloneDriver({ remoteName: 'nas', configFile, pathPrefix: 'backup2' })
  },
  createFull: async () => ({ ...(await create(disk.path)), capacity: CAPACITY }),
  fill: ({ path }, keys) => fillFolder(path, keys),
  manyObjects: 1100,
  largeSize: 8_000_011,
  turns: isThorough ? 2 : 1,
  brief: true,
  // what the core sees of odd sources, it sees for every driver
  parts: ['objects', 'keys', 'sources', 'publishing', 'reading', 'listing', 'storage'],
  timeoutMs: 240_000, // each call starts a program
})
