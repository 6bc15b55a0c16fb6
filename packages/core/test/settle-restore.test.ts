import { mkdtemp, readFile, rename, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, expect, test } from 'vitest'
import { newBackupId } from '../src/backup-id.ts'
import { fileIdentity } from '../src/bitmap-twin.ts'
import { VarveError } from '../src/errors.ts'
import type { VarveEvent } from '../src/events.ts'
import { ImageHost } from '../src/image-host.ts'
import { ranBeforeCut } from '../src/incomplete.ts'
import { RunJournal } from '../src/journal.ts'
import { folderIdentity } from '../src/presence.ts'
import type { ImageState, RbdCluster, RbdImage } from '../src/rbd.ts'
import { recover } from '../src/recover.ts'
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
  /** The one that the restored image is to replace, as it is by now. Default: as it was. */
  now?: ImageState
  /** Why libvirt does not take the definition. */
  refusal?: VarveError
  /** Why an image is not removed. */
  notRemoved?: VarveError
}

/** The image that a restored one is to replace, when the restore ended. */
const REPLACED: ImageState = { id: 'id of vms/a', writtenAt: 'Sat Nov 28 12:00:00 2026' }

/** The host of an instance that is off, on the RBD image `vms/a`, and what is done there. */
function siteOf({ images, open = [], now = REPLACED, refusal, notRemoved }: Site) {
  const done: string[] = []
  const cluster: Partial<RbdCluster> = {
    async imageId(image) {
      return images.includes(image) ? `id of ${image}` : undefined
    },
    async imageState() {
      return now
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
  await journal.record({ step: 'target-create', temporary, folder: await folderIdentity(temporary) })
  await journal.record({ step: 'image-create', image: 'vms/a.new' })
  await journal.record({
    step: 'finish',
    renames: [{ temporary, target, identity: await fileIdentity(temporary) }],
    images: [{ image: 'vms/a.new', target: 'vms/a', id: 'id of vms/a.new', replaces: REPLACED }],
  })
  return { journal, host, temporary, target, done }
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
  { what: 'was written to', now: { ...REPLACED, writtenAt: 'Sun Nov 29 12:00:00 2026' } },
  { what: 'is another image', now: { ...REPLACED, id: 'another' } },
])(
  'an image that $what since the restore ended is not replaced, and nothing else is',
  async ({ what, now }) => {
    const { journal, host, target, done } = await completeRestore({ images: ['vms/a', 'vms/a.new'], now })
    await expect(settleRestore(journal, host, {})).rejects.toMatchObject({
      code: 'RUN_UNRESOLVED',
      message: expect.stringMatching(new RegExp(`rbd:vms/a, .*${what} .*rbd rename.*keep.*runs/.*jsonl`)),
      context: { path: 'rbd:vms/a' },
    })
    expect(done).toEqual([])
    expect(await statIfThere(target)).toBeUndefined()
  },
)

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

const host = new ImageHost({ instance: 'web-1', disks: {} })

/** The journal of a restore in place of these disks, as far as it was written over them. */
async function restoreInPlace(...disks: string[]): Promise<RunJournal> {
  const paths = disks.map(name => ({ name, path: join(folder, name) }))
  const journal = await RunJournal.begin(folder, {
    version: 1,
    id: newBackupId(),
    kind: 'restore',
    instance: 'web-1',
    host: host.reference,
    storage: { type: 'local', location: folder },
    disks: paths,
    startedAt: new Date().toISOString(),
  })
  for (const { name, path } of paths) {
    await writeFile(path, 'half', { flag: 'a' })
    const identity = await fileIdentity(path)
    const folder = await folderIdentity(path)
    await journal.record({ step: 'write-in-place', disk: name, path, identity, folder })
  }
  return journal
}

async function recovered(): Promise<unknown> {
  const { runs, ok } = await recover({ stateDir: folder, storages: [], host })
  return [ok, ...runs.map(({ id, outcome }) => [id, outcome])]
}

test('a disk that was left incomplete is told of until a restore of it is complete', async () => {
  const half = await restoreInPlace('vda', 'vdb')
  const again = [false, [half.header.id, 'incomplete']]
  expect(await recovered()).toEqual(again)
  expect(await recovered()).toEqual(again)

  // Another one that was cut short puts nothing right; one that is complete does, for its disks.
  const short = await restoreInPlace('vda')
  expect(await settleRestore(short, host, {})).toMatchObject({ finished: false, incomplete: ['vda'] })
  const whole = await restoreInPlace('vda')
  await whole.record({ step: 'written-in-place' })
  expect(await settleRestore(whole, host, {})).toMatchObject({ finished: true, incomplete: [] })
  expect(await RunJournal.unsettled(folder)).toEqual([half.header.id])
  const left = await RunJournal.read(folder, half.header.id)
  expect(left?.of('incomplete').at(-1)).toEqual({ step: 'incomplete', disks: ['vdb'] })
  expect(await recovered()).toEqual(again)

  // A new file that takes its place is another disk.
  const swap = await completeRestore({ images: ['vms/a', 'vms/a.new'] })
  await settleRestore(swap.journal, swap.host, {})
  expect(await recovered()).toEqual([true])
  expect(await RunJournal.unsettled(folder)).toEqual([])
})

test('an instance that a restore in place left off ran before it, once no other disk of it is incomplete', async () => {
  const half = await restoreInPlace('vda', 'vdb')
  const power = { instance: 'web-1', wasRunning: true, start: true, timeoutMs: 0 }
  await half.record({ step: 'power-off', ...power })
  await half.record({ step: 'powered-off' })
  const path = (name: string) => join(folder, name)
  const disks = ['vda', 'vdb', 'vdc'].map(name => ({ name, path: path(name) }))
  const ran = (instance: string, ...restored: string[]) =>
    ranBeforeCut(folder, { name: instance, disks }, new Set(restored.map(path)))
  expect(await ran('web-1', 'vda', 'vdb')).toBe(false) // not settled, and so perhaps going on
  await settleRestore(half, host, {})
  expect(await ran('web-1', 'vda', 'vdb')).toBe(true)
  expect(await ran('web-2', 'vda', 'vdb')).toBe(false)
  expect(await ran('web-1', 'vda', 'vdc')).toBe(false)

  // That of a disk restored by its path tells nothing of the instance, but keeps it off.
  const other = await restoreInPlace('vdc')
  await settleRestore(other, host, {})
  expect(await ran('web-1', 'vda', 'vdb')).toBe(false)
  expect(await ran('web-1', 'vda', 'vdb', 'vdc')).toBe(true)
})

test('disks that were left incomplete together are forgotten also where they are restored apart at the same time', async () => {
  const half = await restoreInPlace('vda', 'vdb')
  await settleRestore(half, host, {})
  const apart = await Promise.all([restoreInPlace('vda'), restoreInPlace('vdb')])
  for (const journal of apart) await journal.record({ step: 'written-in-place' })
  await Promise.all(apart.map(journal => settleRestore(journal, host, {})))
  expect(await RunJournal.unsettled(folder)).toEqual([])
})

test('a journal that cannot be read keeps no restore that is complete from being settled', async () => {
  const half = await restoreInPlace('vda')
  await settleRestore(half, host, {})
  const unreadable = await restoreInPlace('vdb')
  await writeFile(join(folder, 'runs', `${unreadable.header.id}.jsonl`), 'not json\n')
  const whole = await restoreInPlace('vda')
  await whole.record({ step: 'written-in-place' })
  await settleRestore(whole, host, {})
  expect(await RunJournal.unsettled(folder)).toEqual([unreadable.header.id])
})

test('an incomplete disk that is gone, or is another one by now, is told of no more', async () => {
  const half = await restoreInPlace('vda', 'vdb')
  expect(await recovered()).toEqual([false, [half.header.id, 'incomplete']])
  await rm(join(folder, 'vda'))
  expect(await recovered()).toEqual([false, [half.header.id, 'incomplete']])
  await writeFile(join(folder, 'other'), 'another disk')
  await rename(join(folder, 'other'), join(folder, 'vdb'))
  expect(await recovered()).toEqual([true])
  expect(await RunJournal.unsettled(folder)).toEqual([])
})

test('nothing is forgotten by a journal of a former version, which tells no folders, where a file is not found', async () => {
  const notFound = expect.stringMatching(/may not be mounted yet.*remove runs\/.*\.jsonl/)
  const path = join(folder, 'vda')
  const half = await restoreInPlace()
  await half.record({ step: 'write-in-place', disk: 'vda', path, identity: '1 2' })
  const warnings: string[] = []
  for (const _ of [1, 2]) {
    const onEvent = (event: VarveEvent) => event.type === 'warning' && warnings.push(event.message)
    expect(await settleRestore(half, host, { onEvent })).toMatchObject({ incomplete: ['vda'] })
  }
  expect(warnings).toEqual([notFound])

  const cut = await restoreInPlace()
  await cut.record({ step: 'target-create', temporary: `${path}.new` })
  const unresolved = { code: 'RUN_UNRESOLVED', message: notFound }
  await expect(settleRestore(cut, host, {})).rejects.toMatchObject(unresolved)
  await writeFile(`${path}.new`, 'half')
  expect(await settleRestore(cut, host, {})).toMatchObject({ finished: false })
  expect(await statIfThere(`${path}.new`)).toBeUndefined()

  const complete = await restoreInPlace()
  await complete.record({ step: 'finish', renames: [{ temporary: `${path}.new`, target: path }] })
  await writeFile(path, 'old')
  await expect(settleRestore(complete, host, {})).rejects.toMatchObject(unresolved)
  await writeFile(`${path}.new`, 'restored')
  expect(await settleRestore(complete, host, {})).toMatchObject({ finished: true })
  expect(await readFile(path, 'utf8')).toBe('restored')
})

test('a new disk that has its name is known again once the restore is called for again', async () => {
  const site = await completeRestore({ images: ['vms/a', 'vms/a.new'] })
  await rename(site.temporary, site.target) // as far as it came before it was cut short
  expect(await settleRestore(site.journal, site.host, {})).toMatchObject({ finished: true })
})

test('an image is not forgotten while no domain tells its cluster, as another one may have been asked', async () => {
  const of = { instance: 'web-1', disk: 'vda' }
  const xml = `<domain><devices><disk type='network' device='disk'><driver type='raw'/>
    <source protocol='rbd' name='vms/a'><host name='ceph'/></source><target dev='vda'/></disk></devices></domain>`
  let definition: string | undefined
  class Domain extends ImageHost {
    override readonly reference = { kind: 'libvirt', uri: 'test:///default' } as never
    override async describe() {
      return definition as undefined
    }
    override async rbd() {
      const cluster: Partial<RbdCluster> = {
        async imageId() {
          return undefined
        },
        async image() {
          return { id: 'of the same name' } as RbdImage
        },
      }
      return cluster as RbdCluster
    }
  }
  const domain = new Domain({ instance: 'web-1', disks: {} })
  const half = await restoreInPlace()
  await half.record({ step: 'write-in-place', disk: 'vda', path: 'rbd:vms/a', identity: '5e', of })
  const cut = await restoreInPlace()
  await cut.record({ step: 'image-create', image: 'vms/a.new', of })
  for (const _ of [1, 2]) expect(await settleRestore(half, domain, {})).toMatchObject({ incomplete: ['vda'] })
  await expect(settleRestore(cut, domain, {})).rejects.toMatchObject({
    code: 'RUN_UNRESOLVED',
    message: expect.stringMatching(/vms\/a\.new.*Define it again.*remove runs\/.*\.jsonl/),
  })
  definition = xml
  expect(await settleRestore(half, domain, {})).toMatchObject({ incomplete: [] })
  expect(await settleRestore(cut, domain, {})).toMatchObject({ finished: false })
  expect(await RunJournal.unsettled(folder)).toEqual([])
})

test('an RBD image is told from another one that has its name by now', async () => {
  let id = '5e'
  const asked: unknown[] = []
  class Domain extends ImageHost {
    override async rbd(...args: unknown[]) {
      asked.push(args[0])
      const cluster: Partial<RbdCluster> = {
        async image() {
          if (id === '') throw new VarveError('DISK_NOT_FOUND', 'no image')
          return { id } as RbdImage
        },
      }
      return cluster as RbdCluster
    }
  }
  const domain = new Domain({ instance: 'web-1', disks: {} })
  const of = { instance: 'web-1', disk: 'vda' }
  for (const other of ['6f', '']) {
    const journal = await restoreInPlace()
    id = '5e'
    const path = 'rbd:vms/a'
    await journal.record({ step: 'write-in-place', disk: 'vda', path, identity: id, of })
    for (const _ of [1, 2])
      expect(await settleRestore(journal, domain, {})).toMatchObject({ incomplete: ['vda'] })
    id = other
    expect(await settleRestore(journal, domain, {})).toMatchObject({ incomplete: [] })
    expect(await RunJournal.unsettled(folder)).toEqual([])
  }
  expect(asked).toEqual(Array(4).fill(of))
})

test('an instance that libvirt may be destroying is given the time that this takes, whatever the guest was given', async () => {
  const waited: number[] = []
  const started: string[] = []
  class Domain extends ImageHost {
    override async waitUntilOff(_instance?: string, timeoutMs = 0) {
      waited.push(timeoutMs)
      return true
    }
    override async start(instance?: string) {
      started.push(instance ?? '')
    }
  }
  for (const timeoutMs of [0, 60_000]) {
    const journal = await restoreInPlace()
    await journal.record({
      ...{ step: 'power-off', instance: 'web-1', wasRunning: true, start: true },
      timeoutMs,
    })
    await settleRestore(journal, new Domain({ instance: 'web-1', disks: {} }), {})
  }
  expect(waited).toEqual([15_000, 60_000])
  expect(started).toEqual(['web-1', 'web-1'])
})
