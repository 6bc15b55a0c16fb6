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

interface Site {
  /** The images in the cluster. */
  images: string[]
  /** Of these, those that somebody has open. */
  open?: string[]
  /** Why libvirt does not take the definition. */
  refusal?: VarveError
  /** Why an image is not removed. */
  notRemoved?: VarveError
}

/** The host of an instance that is off, on the RBD image `vms/a`, and what is done there. */
function siteOf({ images, open = [], refusal, notRemoved }: Site) {
  const done: string[] = []
  const cluster: Partial<RbdCluster> = {
    async imageId(image) {
      return images.includes(image) ? `id of ${image}` : undefined
    },
    async image() {
      return { id: 'a', size: 0, snapshots: [], metadata: new Map(), objectMapInvalid: false }
    },
    async isOpen(image) {
      if (!images.includes(image)) throw new VarveError('DISK_NOT_FOUND', `no ${image}`)
      // What a look at an image that stays open ends with.
      if (open.includes(image)) throw new VarveError('DISK_BUSY', `${image} is open`)
      return false
    },
    async renameImage(from, to) {
      done.push(`rename ${from} ${to}`)
    },
    async removeImage(image) {
      done.push(`remove ${image}`)
      if (notRemoved) throw notRemoved
    },
  }
  class Domain extends ImageHost {
    override async rbd() {
      return cluster as RbdCluster
    }
    override async define() {
      if (refusal) throw refusal
      done.push('define')
    }
    override async start() {
      done.push('start')
    }
  }
  return { host: new Domain({ instance: 'web-1', disks: { vda: 'rbd:vms/a' } }), done }
}

async function begin(host: ImageHost): Promise<RunJournal> {
  return RunJournal.begin(folder, {
    version: 1,
    id: newBackupId(),
    kind: 'restore',
    instance: 'web-1',
    host: host.reference,
    storage: { type: 'local', location: folder },
    disks: [],
    startedAt: new Date().toISOString(),
  })
}

/** A restore of an RBD image and a file that is complete. */
async function completeRestore(site: Site) {
  const { host, done } = siteOf(site)
  const journal = await begin(host)
  const [temporary, target] = [join(folder, 'vdb.new'), join(folder, 'vdb')]
  await writeFile(temporary, 'restored')
  await journal.record({ step: 'define', instance: 'web-1', xml: '<domain/>' })
  await journal.record({ step: 'target-create', temporary })
  await journal.record({ step: 'image-create', image: 'vms/a.new' })
  await journal.record({
    step: 'finish',
    renames: [{ temporary, target }],
    images: [{ image: 'vms/a.new', target: 'vms/a', id: 'id of vms/a.new' }],
  })
  return { journal, host, target, done }
}

/** A restore of an RBD image that ended once its instance, which ran, was off. */
async function cutRestore(site: Site) {
  const { host, done } = siteOf(site)
  const journal = await begin(host)
  await journal.record({ step: 'image-create', image: 'vms/a.new' })
  const power = { instance: 'web-1', wasRunning: true, start: true, timeoutMs: 0 }
  await journal.record({ step: 'power-off', ...power })
  await journal.record({ step: 'powered-off' })
  return { journal, host, done }
}

test('nothing is defined and no file is replaced where an image is in use again', async () => {
  const { journal, host, target, done } = await completeRestore({
    images: ['vms/a', 'vms/a.new'],
    open: ['vms/a'],
  })
  await expect(settleRestore(journal, host, {})).rejects.toMatchObject({
    code: 'RUN_UNRESOLVED',
    message: expect.stringContaining('rbd:vms/a'),
  })
  expect(done).toEqual([])
  expect(await statIfThere(target)).toBeUndefined()
  expect(await RunJournal.unsettled(folder)).toHaveLength(1)
})

test.for([
  { there: 'nothing', images: [] },
  { there: 'only the image that it was to replace', images: ['vms/a'] },
])(
  'an image that is gone from its cluster, where there is $there, is not said to be restored',
  async ({ images }) => {
    const { journal, host, target, done } = await completeRestore({ images })
    await expect(settleRestore(journal, host, {})).rejects.toMatchObject({
      code: 'RUN_UNRESOLVED',
      message: expect.stringContaining(`runs/${journal.header.id}.jsonl`),
      context: { image: 'vms/a.new', target: 'vms/a' },
    })
    expect(done).toEqual([])
    expect(await statIfThere(target)).toBeUndefined()
  },
)

test('where libvirt refuses the definition the new image is removed, and no other is touched', async () => {
  const refusal = new VarveError('COMMAND_FAILED', 'no such machine type')
  const { journal, host, target, done } = await completeRestore({ images: ['vms/a', 'vms/a.new'], refusal })
  const settled = await settleRestore(journal, host, {})
  expect(settled).toMatchObject({ finished: false, refusal: { code: 'COMMAND_FAILED', cause: refusal } })
  expect(done).toEqual(['remove vms/a.new'])
  expect(await statIfThere(target)).toBeUndefined()
  expect(await RunJournal.unsettled(folder)).toEqual([])
})

test('an instance is started before the image that a restore had begun is removed', async () => {
  const { journal, host, done } = await cutRestore({ images: ['vms/a', 'vms/a.new'] })
  expect(await settleRestore(journal, host, {})).toMatchObject({ finished: false, started: true })
  expect(done).toEqual(['start', 'remove vms/a.new'])
  expect(await RunJournal.unsettled(folder)).toEqual([])
})

test('an instance is started also where the image that a restore had begun cannot be removed, which stays on record', async () => {
  const notRemoved = new VarveError('RBD_FAILED', 'it has a snapshot')
  const { journal, host, done } = await cutRestore({ images: ['vms/a', 'vms/a.new'], notRemoved })
  await expect(settleRestore(journal, host, {})).rejects.toBe(notRemoved)
  expect(done).toEqual(['start', 'remove vms/a.new'])
  expect(await RunJournal.unsettled(folder)).toEqual([journal.header.id])
})

test('an instance whose image is open in a virtual machine of another host is not started as well', async () => {
  const images = ['vms/a', 'vms/a.new']
  const { journal, host, done } = await cutRestore({ images, open: ['vms/a'] })
  await expect(settleRestore(journal, host, {})).rejects.toMatchObject({
    code: 'RUN_UNRESOLVED',
    message: expect.stringContaining('vms/a is open elsewhere'),
    context: { instance: 'web-1', image: 'vms/a' },
  })
  expect(done).toEqual(['remove vms/a.new'])
  expect(await RunJournal.unsettled(folder)).toEqual([journal.header.id])
})
