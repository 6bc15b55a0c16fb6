import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, expect, test } from 'vitest'
import { newBackupId } from '../src/backup-id.ts'
import { VarveError } from '../src/errors.ts'
import { ImageHost } from '../src/image-host.ts'
import { RunJournal } from '../src/journal.ts'
import type { RbdCluster } from '../src/rbd.ts'
import { settleRestore } from '../src/settle-restore.ts'
import { statIfThere } from '../src/stat-if-there.ts'

let folder: string
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'varve-settle-'))
})
afterEach(() => rm(folder, { recursive: true }))

test('nothing is defined and no file is replaced where an image is in use again', async () => {
  const done: string[] = []
  const images = new Set(['vms/a', 'vms/a.new'])
  const cluster: Partial<RbdCluster> = {
    async snapshots(image) {
      if (!images.has(image)) throw new VarveError('DISK_NOT_FOUND', `no ${image}`)
      return []
    },
    async isOpen(image) {
      // What a look at an image that stays open ends with.
      throw new VarveError('DISK_BUSY', `${image} is open`)
    },
    async renameImage(from, to) {
      done.push(`rename ${from} ${to}`)
    },
  }
  class Domain extends ImageHost {
    override async rbd() {
      return cluster as RbdCluster
    }
    override async define() {
      done.push('define')
    }
  }
  const host = new Domain({ instance: 'web-1', disks: {} })
  const journal = await RunJournal.begin(folder, {
    version: 1,
    id: newBackupId(),
    kind: 'restore',
    instance: 'web-1',
    host: host.reference,
    storage: { type: 'local', location: folder },
    disks: [],
    startedAt: new Date().toISOString(),
  })
  const [temporary, target] = [join(folder, 'vdb.new'), join(folder, 'vdb')]
  await writeFile(temporary, 'restored')
  await journal.record({ step: 'define', instance: 'web-1', xml: '<domain/>' })
  await journal.record({
    step: 'finish',
    renames: [{ temporary, target }],
    images: [{ image: 'vms/a.new', target: 'vms/a' }],
  })
  await expect(settleRestore(journal, host, {})).rejects.toMatchObject({
    code: 'RUN_UNRESOLVED',
    message: expect.stringContaining('rbd:vms/a'),
  })
  expect(done).toEqual([])
  expect(await statIfThere(target)).toBeUndefined()
  expect(await RunJournal.unsettled(folder)).toHaveLength(1)
})
