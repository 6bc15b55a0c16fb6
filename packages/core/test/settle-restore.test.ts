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

/** A restore of an RBD image and a file that is complete, and what is done to its host. */
async function completeRestore(options: {
  images: string[]
  isOpen?: boolean
  /** Why libvirt does not take the definition. */
  refusal?: VarveError
}) {
  const done: string[] = []
  const cluster: Partial<RbdCluster> = {
    async snapshots(image) {
      if (!options.images.includes(image)) throw new VarveError('DISK_NOT_FOUND', `no ${image}`)
      return []
    },
    async isOpen(image) {
      // What a look at an image that stays open ends with.
      if (options.isOpen) throw new VarveError('DISK_BUSY', `${image} is open`)
      return false
    },
    async renameImage(from, to) {
      done.push(`rename ${from} ${to}`)
    },
    async removeImage(image) {
      done.push(`remove ${image}`)
    },
  }
  class Domain extends ImageHost {
    override async rbd() {
      return cluster as RbdCluster
    }
    override async define() {
      if (options.refusal) throw options.refusal
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
  await journal.record({ step: 'target-create', temporary })
  await journal.record({ step: 'image-create', image: 'vms/a.new' })
  await journal.record({
    step: 'finish',
    renames: [{ temporary, target }],
    images: [{ image: 'vms/a.new', target: 'vms/a' }],
  })
  return { journal, host, target, done }
}

test('nothing is defined and no file is replaced where an image is in use again', async () => {
  const { journal, host, target, done } = await completeRestore({
    images: ['vms/a', 'vms/a.new'],
    isOpen: true,
  })
  await expect(settleRestore(journal, host, {})).rejects.toMatchObject({
    code: 'RUN_UNRESOLVED',
    message: expect.stringContaining('rbd:vms/a'),
  })
  expect(done).toEqual([])
  expect(await statIfThere(target)).toBeUndefined()
  expect(await RunJournal.unsettled(folder)).toHaveLength(1)
})

test('an image that is not in the cluster, under neither name, is not said to be restored', async () => {
  const { journal, host, target, done } = await completeRestore({ images: [] })
  await expect(settleRestore(journal, host, {})).rejects.toMatchObject({
    code: 'RUN_UNRESOLVED',
    message: expect.stringContaining(`runs/${journal.header.id}.jsonl`),
    context: { image: 'vms/a.new', target: 'vms/a' },
  })
  expect(done).toEqual([])
  expect(await statIfThere(target)).toBeUndefined()
})

test('where libvirt refuses the definition the new image is removed, and no other is touched', async () => {
  const refusal = new VarveError('COMMAND_FAILED', 'no such machine type')
  const { journal, host, target, done } = await completeRestore({ images: ['vms/a', 'vms/a.new'], refusal })
  const settled = await settleRestore(journal, host, {})
  expect(settled).toMatchObject({ finished: false, refusal: { code: 'COMMAND_FAILED', cause: refusal } })
  expect(done).toEqual(['remove vms/a.new'])
  expect(await statIfThere(target)).toBeUndefined()
  expect(await RunJournal.unsettled(folder)).toEqual([])
})
