import { mkdir, mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { LocalDriver } from '@varve/driver-local'
import { createQcow2, type LabDomain, type LibvirtLab, qemuIo, startLibvirt } from '@varve/testkit/lab'
import { afterAll, afterEach, beforeAll, beforeEach, expect, test } from 'vitest'
import { BackupPipeline } from '../src/backup-pipeline.ts'
import { ChainManager } from '../src/chain-manager.ts'
import type { ErrorCode } from '../src/errors.ts'
import type { HostReference } from '../src/host.ts'
import { ImageHost } from '../src/image-host.ts'
import { LibvirtHost } from '../src/libvirt-host.ts'
import { RestorePipeline } from '../src/restore-pipeline.ts'
import type { StoredObject } from '../src/storage.ts'
import type { Bundle } from './bundle.ts'
import { expectContent } from './torture/expect-content.ts'
import { randomChange } from './torture/guest.ts'
import type { Task } from './torture/job.ts'
import type { Content } from './torture/proving-ground.ts'
import { Random } from './torture/random.ts'
import { bundleVictim, type End, Victims } from './torture/victims.ts'

const DISK_BYTES = 4 * 1024 * 1024 + 3 * 512
const TARGETS = ['vda', 'vdb'] as const

let lab: LibvirtLab
let program: Bundle
let folder: string
let processes: Victims

beforeAll(async () => {
  lab = await startLibvirt()
  program = await bundleVictim()
})
afterAll(async () => {
  await program[Symbol.asyncDispose]()
  await lab.stop()
})
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'varve-concurrency-'))
  await mkdir(join(folder, 'storage'))
  await mkdir(join(folder, 'tmp'))
  processes = await Victims.prepare(join(folder, 'tmp'), program)
})
afterEach(async () => {
  await processes[Symbol.asyncDispose]()
  await rm(folder, { recursive: true })
})

const storagePath = () => join(folder, 'storage')
const storage = () => new LocalDriver({ path: storagePath() })

/** An instance with two disks, and beside them what they must hold. `machine` has a state folder of its own. */
class Subject {
  readonly instance: string
  readonly #place: string
  readonly #content = new Map<string, Buffer>()
  domain: LabDomain | undefined

  private constructor(machine: string, instance: string) {
    this.instance = instance
    this.#place = join(folder, machine, instance)
  }

  static async create(machine: string, instance: string): Promise<Subject> {
    const subject = new Subject(machine, instance)
    await mkdir(subject.#place, { recursive: true })
    for (const target of TARGETS) {
      await createQcow2(subject.image(target), DISK_BYTES)
      subject.#content.set(target, Buffer.alloc(DISK_BYTES))
    }
    return subject
  }

  /** Runs it as a domain. */
  async start(): Promise<void> {
    const disks = TARGETS.map(target => ({
      ...{ target, path: this.image(target), format: 'qcow2' as const, discard: 'unmap' as const },
    }))
    this.domain = await lab.createDomain({ name: this.instance, guest: false, disks })
    await this.domain.start()
  }

  async end(): Promise<void> {
    await this.domain?.destroy()
    await this.domain?.undefine()
  }

  image(target: string): string {
    return join(this.#place, target)
  }

  get stateDir(): string {
    return join(this.#place, '../state')
  }

  get content(): Content {
    return Object.fromEntries([...this.#content].map(([target, bytes]) => [target, Buffer.from(bytes)]))
  }

  get host(): LibvirtHost | ImageHost {
    const disks = TARGETS.map(target => [target, { path: this.image(target), format: 'qcow2' }] as const)
    return this.domain
      ? new LibvirtHost({ uri: lab.uri })
      : new ImageHost({ instance: this.instance, disks: Object.fromEntries(disks) })
  }

  async write(random: Random): Promise<void> {
    for (const [target, content] of this.#content) {
      const commands = Array.from({ length: 3 }, () => randomChange(content, random))
      if (this.domain) await this.domain.io(target, ...commands)
      else await qemuIo(this.image(target), 'qcow2', commands)
    }
  }

  /** In a process of its own. */
  run(task: Task): Promise<End> {
    const reference: HostReference = this.host.reference
    const { stateDir } = this
    return processes.run({
      ...{ task, host: reference, storage: storagePath(), stateDir },
      frozenFlag: join(folder, 'agent'),
    })
  }
}

/** What a backup restores to. */
async function restored(id: string): Promise<Content> {
  const target = await mkdtemp(join(folder, 'restored-'))
  const disks = Object.fromEntries(TARGETS.map(name => [name, join(target, name)]))
  const host = new ImageHost({ instance: 'none', disks: {} })
  const pipeline = new RestorePipeline({ host, storage: storage(), stateDir: join(folder, 'restores') })
  await pipeline.run({ backup: id, to: { disks, format: 'raw' } })
  const content: Record<string, Buffer> = {}
  for (const name of TARGETS) content[name] = await readFile(join(target, name))
  await rm(target, { recursive: true })
  return content
}

/** The id of the backup that a process took. */
function backupOf(end: End): string {
  if (end.killed || end.failure || end.backup === undefined) throw new Error(JSON.stringify(end))
  return end.backup
}

test('many instances with several disks, backed up at once by one process and by others, do not disturb each other', async () => {
  const random = new Random(5)
  const names = ['web-1', 'web-2', 'web-3', 'web-4']
  const subjects = await Promise.all(names.map(name => Subject.create('host', name)))
  const running = subjects.slice(0, 2)
  for (const subject of running) await subject.start()
  try {
    const wanted = new Map<string, Content>()
    for (let round = 0; round < 2; round++) {
      for (const subject of subjects) await subject.write(random)
      const ids = await Promise.all(
        subjects.map(async (subject, index) => {
          const { instance, host, stateDir } = subject
          if (index % 2 === 1) return backupOf(await subject.run({ kind: 'backup', request: { instance } }))
          const manifest = await new BackupPipeline({ host, storage: storage(), stateDir }).run({ instance })
          expect(manifest.kind).toBe(round === 0 ? 'full' : 'incremental')
          return manifest.id
        }),
      )
      for (const [index, id] of ids.entries()) wanted.set(id, subjects[index]?.content ?? {})
    }
    expect(wanted.size).toBe(8)
    for (const [id, content] of wanted) expectContent(id, await restored(id), content)
    for (const subject of running) {
      const { disks } = await subject.host.instance(subject.instance)
      expect(disks.map(({ path }) => path)).toEqual(TARGETS.map(name => subject.image(name)))
    }
  } finally {
    for (const subject of running) await subject.end()
  }
})

test('of two backups of the same disk one wins, and the other is told at once, in the same process and in another', async () => {
  const subject = await Subject.create('host', 'web-1')
  const { instance, host, stateDir } = subject
  await subject.write(new Random(1))
  const began = Promise.withResolvers<void>()
  const goOn = Promise.withResolvers<void>()
  class HeldStorage extends LocalDriver {
    override async put(...args: Parameters<LocalDriver['put']>): Promise<StoredObject> {
      began.resolve()
      await goOn.promise
      return super.put(...args)
    }
  }
  const winner = new BackupPipeline({ host, storage: new HeldStorage({ path: storagePath() }), stateDir })
  const manifest = winner.run({ instance })
  await began.promise
  const busy = { code: 'DISK_BUSY', retryable: true }
  const other = new BackupPipeline({ host, storage: storage(), stateDir: join(folder, 'other-state') })
  await expect(other.run({ instance, disks: ['vdb'] })).rejects.toMatchObject(busy)
  const end = await subject.run({ kind: 'backup', request: { instance } })
  expect(end).toMatchObject({ failure: { code: 'DISK_BUSY' } })
  goOn.resolve()
  const { id } = await manifest
  expectContent(id, await restored(id), subject.content)
  const { backups } = await new ChainManager({ storage: storage() }).list()
  expect(backups.map(({ manifest }) => manifest.id)).toEqual([id])
})

/** How a run may end that met another one: what it rests on, or what it was to delete, has gone or is used by now. */
const MET_ANOTHER: readonly ErrorCode[] = ['PARENT_MISSING', 'BACKUP_NOT_FOUND', 'CHAIN_DEPENDENCY']

const ROUNDS = 4
/** Where by then no run has met another, or none had anything to build on. */
const MOST_ROUNDS = 18

test('two hosts that back up, delete and prune the same instance on one storage damage no backup', async () => {
  const seed = Number(process.env.VARVE_SEED ?? 3)
  const random = new Random(seed)
  const manager = new ChainManager({ storage: storage() })
  const hosts = [await Subject.create('one', 'web-1'), await Subject.create('two', 'web-1')]
  const wanted = new Map<string, Content>()
  const gone = new Set<string>()
  const story: string[] = []
  const increments = new Set<string>()
  let meetings = 0
  const isEnough = () => increments.size > 0 && meetings > 0
  try {
    for (let round = 0; round < ROUNDS || (!isEnough() && round < MOST_ROUNDS); round++) {
      for (const host of hosts) await host.write(random)
      const some = wanted.size > 0 ? random.pick([...wanted.keys()]) : undefined
      const runs = hosts.map(async host => {
        const task: Task = { kind: 'backup', request: { instance: 'web-1' } }
        const end = await host.run(task)
        story.push(`backup ${JSON.stringify(end)}`)
        if (!end.killed && end.backup !== undefined) wanted.set(end.backup, host.content)
        return end
      })
      const others: Task[] = [
        { kind: 'prune', policy: { instance: 'web-1', keepLast: 1 + random.below(3) } },
        ...(some === undefined ? [] : [{ kind: 'delete', backup: some } as const]),
      ]
      for (const task of others) runs.push(random.pick(hosts).run(task))
      const ends = await Promise.all(runs)
      story.push(...ends.slice(2).map(end => JSON.stringify(end)))
      for (const end of ends) {
        if (end.killed) throw new Error('nobody kills here')
        if (end.failure) expect(MET_ANOTHER).toContain(end.failure.code)
        if (end.failure) meetings++
        for (const id of end.removed ?? []) gone.add(id)
      }
      expect(ends[2], 'the prune').not.toHaveProperty('failure') // which would not tell what it removed

      const { backups, damaged } = await manager.list()
      expect(damaged).toEqual([])
      expect(backups.map(({ manifest }) => manifest.id).sort()).toEqual(
        [...wanted.keys()].filter(id => !gone.has(id)).sort(),
      )
      for (const { manifest } of backups) if (manifest.kind === 'incremental') increments.add(manifest.id)
      // There may be none: a prune kept only what was deleted meanwhile.
      const looked = round >= ROUNDS - 1 || backups.length === 0 ? backups : [random.pick(backups)]
      for (const { manifest } of looked) {
        const content = wanted.get(manifest.id)
        if (!content) throw new Error(`nobody took ${manifest.id}`)
        expect((await manager.verify(manifest.id, { deep: true })).problems).toEqual([])
        expectContent(manifest.id, await restored(manifest.id), content)
      }
    }
    // A backup fails only when its parent has gone, and the one after it is then a full one.
    expect(wanted.size).toBeGreaterThanOrEqual(ROUNDS)
    // Runs that never meet, and backups that rest on nothing, would damage none either.
    expect(increments.size, 'increments').toBeGreaterThan(0)
    expect(meetings, 'runs that met another one').toBeGreaterThan(0)
  } catch (error) {
    throw new Error(`seed ${seed}:\n${story.join('\n')}`, { cause: error })
  }
})
