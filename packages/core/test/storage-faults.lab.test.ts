import { cp, mkdir, mkdtemp, readdir, readFile, rename, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { LocalDriver } from '@varve/driver-local'
import { type Fault, FaultyDriver, type StorageCall } from '@varve/testkit'
import { checkQcow2, createQcow2, qemuIo } from '@varve/testkit/lab'
import { execa } from 'execa'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { BackupPipeline, type BackupRequest } from '../src/backup-pipeline.ts'
import { diskMark, twinOf } from '../src/bitmap-twin.ts'
import { ChainManager } from '../src/chain-manager.ts'
import { isVarveError, VarveError } from '../src/errors.ts'
import { ImageHost } from '../src/image-host.ts'
import type { BackupManifest } from '../src/manifest.ts'
import type { PruneReport } from '../src/prune.ts'
import { recover } from '../src/recover.ts'
import { RestorePipeline } from '../src/restore-pipeline.ts'
import type { StorageDriver } from '../src/storage.ts'
import { adoptMarks } from './adopt-marks.ts'
import { Random } from './torture/random.ts'

const INSTANCE = 'web-1'
const MiB = 1024 * 1024

/**
 * Cases of each task that the suite takes, at random; `VARVE_FAULTS=all` takes all there are, some 600, and
 * `VARVE_FAULTS=late` all those of one kind.
 */
const SAMPLE = 2
const wanted = process.env.VARVE_FAULTS
const seed = Number(process.env.VARVE_SEED ?? Date.now() % 1_000_000)

const lost = new VarveError('STORAGE_UNREACHABLE', 'The answer got lost.')
const full = new VarveError('STORAGE_FULL', 'There is no room.')

/** After which the call was given up. */
const LATER_MS = 600_000

/** What can go wrong with each kind of call. That of an object's bytes is somewhere in it; see {@link somewhere}. */
const FAULTS: Readonly<Record<StorageCall['operation'], readonly Fault[]>> = {
  put: [
    { kind: 'fail-before', error: full },
    { kind: 'fail-after', error: lost },
    { kind: 'stall' },
    { kind: 'late', ms: LATER_MS },
    { kind: 'late', ms: 1 },
    { kind: 'fail-at', offset: 0, error: full },
    { kind: 'stall-at', offset: 0 },
    { kind: 'end-at', offset: 0 },
    { kind: 'append', bytes: 7 },
    { kind: 'flip-bit', offset: 0 },
    { kind: 'resize', by: 1 },
  ],
  get: [
    { kind: 'fail-before', error: lost },
    { kind: 'fail-after', error: lost },
    { kind: 'stall' },
    { kind: 'late', ms: LATER_MS },
    { kind: 'late', ms: 1 },
    { kind: 'fail-at', offset: 0, error: lost },
    { kind: 'stall-at', offset: 0 },
    { kind: 'end-at', offset: 0 },
    { kind: 'append', bytes: 7 },
    { kind: 'flip-bit', offset: 0 },
  ],
  stat: [{ kind: 'fail-before', error: lost }, { kind: 'stall' }, { kind: 'resize', by: -1 }],
  list: [
    { kind: 'fail-before', error: lost },
    { kind: 'fail-after', error: lost },
    { kind: 'stall' },
    { kind: 'resize', by: 1 },
    { kind: 'stale', changes: 1 },
    { kind: 'stale', changes: Number.POSITIVE_INFINITY },
  ],
  delete: [
    { kind: 'fail-before', error: lost },
    { kind: 'fail-after', error: lost },
    { kind: 'stall' },
    { kind: 'late', ms: LATER_MS },
    { kind: 'late', ms: 1 },
  ],
  check: [],
  cleanUp: [],
}

let folder: string
/** What the disk held at each backup, and holds now. */
const contents = new Map<string, Buffer>()
let now: Buffer
/** The template's backups: a full one, an increment, and a second full one. */
let ids: readonly string[]

const at = (place: string) => ({
  disk: join(place, 'disk.qcow2'),
  storage: join(place, 'storage'),
  stateDir: join(place, 'state'),
  target: join(place, 'restored.raw'),
})
const host = (place: string) => new ImageHost({ instance: INSTANCE, disks: { vda: at(place).disk } })

async function content(place: string): Promise<Buffer> {
  const raw = join(place, 'content.raw')
  await execa('qemu-img', ['convert', '-f', 'qcow2', '-O', 'raw', at(place).disk, raw])
  const bytes = await readFile(raw)
  await rm(raw)
  return bytes
}

async function backup(
  place: string,
  storage: StorageDriver,
  request: Partial<BackupRequest> = {},
  signal?: AbortSignal,
) {
  const pipeline = new BackupPipeline({ host: host(place), storage, stateDir: at(place).stateDir })
  const manifest = await pipeline.run({ instance: INSTANCE, ...request }, signal ? { signal } : {})
  return manifest
}

async function restore(
  place: string,
  storage: StorageDriver,
  id: string,
  signal?: AbortSignal,
): Promise<Buffer> {
  const { target, stateDir } = at(place)
  const pipeline = new RestorePipeline({ host: host(place), storage, stateDir })
  await pipeline.run({ backup: id, to: { disks: { vda: target }, format: 'raw' } }, signal ? { signal } : {})
  const bytes = await readFile(target)
  await rm(target)
  return bytes
}

/** Restores the second backup over the instance. */
async function restoreOver(
  place: string,
  storage: StorageDriver,
  { inPlace, signal }: { inPlace: boolean; signal?: AbortSignal },
): Promise<void> {
  const pipeline = new RestorePipeline({ host: host(place), storage, stateDir: at(place).stateDir })
  const request = { backup: ids[1] ?? '', to: { instance: INSTANCE }, inPlace }
  await pipeline.run(request, signal ? { signal } : {})
}

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'varve-faults-'))
  // Where the cases are too: a disk under another path is another disk, and its backup a full one.
  const place = join(folder, 'case')
  const { disk, storage: path } = at(place)
  await mkdir(path, { recursive: true })
  await createQcow2(disk, 2 * MiB)
  const storage = new LocalDriver({ path })
  const steps = [
    ['auto', 'write -P 1 0 700k'],
    ['auto', 'write -P 2 600k 200k', 'write -z 0 64k'],
    ['full', 'write -P 3 1M 300k'],
  ] as const
  const made: string[] = []
  for (const [type, ...commands] of steps) {
    await qemuIo(disk, 'qcow2', commands)
    const { id } = await backup(place, storage, { type })
    contents.set(id, await content(place))
    made.push(id)
  }
  await qemuIo(disk, 'qcow2', ['write -P 4 100k 300k', 'write -z 1M 64k'])
  now = await content(place)
  ids = made
  for (const id of ids)
    expect((await restore(place, storage, id)).equals(contents.get(id) ?? now), id).toBe(true)
  await rename(place, join(folder, 'template'))
})
afterAll(() => rm(folder, { recursive: true }))

interface Task {
  readonly name: string
  /** What it removes of the template's backups. Default: nothing. */
  readonly removes?: () => readonly string[]
  /** Whether the disk holds the second backup afterwards. Default: false. */
  readonly restores?: boolean
  /** Whether a backup reads back what it has stored. Default: true. */
  readonly readsBack?: boolean
  /** Cases that the suite takes of it. Default: {@link SAMPLE}. Two that are much alike have one each. */
  readonly sample?: number
  run(place: string, storage: StorageDriver, signal: AbortSignal): Promise<unknown>
}

const TASKS: readonly Task[] = [
  {
    name: 'a full backup',
    run: (place, storage, signal) => backup(place, storage, { type: 'full', verifyUpload: 'digest' }, signal),
  },
  {
    name: 'an increment',
    sample: 1,
    run: (place, storage, signal) => backup(place, storage, { verifyUpload: 'digest' }, signal),
  },
  {
    name: 'an increment as by default',
    sample: 1,
    readsBack: false,
    run: (place, storage, signal) => backup(place, storage, {}, signal),
  },
  {
    name: 'a restore',
    sample: 1,
    run: async (place, storage, signal) => {
      const id = ids[1] ?? ''
      expect((await restore(place, storage, id, signal)).equals(contents.get(id) ?? now)).toBe(true)
    },
  },
  {
    name: 'a restore in place',
    restores: true,
    run: (place, storage, signal) => restoreOver(place, storage, { inPlace: true, signal }),
  },
  {
    name: 'a restore over the instance',
    sample: 1,
    restores: true,
    run: (place, storage, signal) => restoreOver(place, storage, { inPlace: false, signal }),
  },
  {
    name: 'a deep verification',
    run: async (_place, storage, signal) => {
      const report = await new ChainManager({ storage }).verify(ids[1] ?? '', { deep: true, signal })
      if (!report.ok) throw new VarveError('DIGEST_MISMATCH', 'The damage was found.')
    },
  },
  {
    name: 'a deletion',
    removes: () => ids.slice(1, 2),
    run: (_place, storage, signal) => new ChainManager({ storage }).delete(ids[1] ?? '', { signal }),
  },
  {
    name: 'a prune',
    removes: () => ids.slice(0, 2),
    run: (_place, storage, signal) =>
      new ChainManager({ storage }).prune({ instance: INSTANCE, keepLast: 1 }, { signal }),
  },
]

/** Puts a copy of the template in its place. */
async function load(): Promise<string> {
  const place = join(folder, 'case')
  await rm(place, { recursive: true, force: true })
  await cp(join(folder, 'template'), place, { recursive: true, preserveTimestamps: true })
  await adoptMarks('vda', at(place).disk)
  return place
}

/** Runs a task on a copy of the template, with `fault` at its `index`th call, and returns the calls. */
async function runWith(task: Task, index: number, fault?: Fault) {
  const place = await load()
  const giveUp = new AbortController()
  let calls = 0
  const storage = new FaultyDriver(new LocalDriver({ path: at(place).storage }), () => {
    if (calls++ !== index) return undefined
    // What never answers is given up by whoever waits for it: at once, to the test.
    const isLate = fault?.kind === 'late' && fault.ms === LATER_MS
    if (isLate || fault?.kind.startsWith('stall')) setTimeout(() => giveUp.abort(), 20)
    return fault
  })
  const outcome = await task.run(place, storage, giveUp.signal).then(
    result => ({ result, error: undefined }),
    (error: unknown) => ({ result: undefined, error }),
  )
  return { place, calls: storage.calls, ...outcome }
}

type Outcome = Awaited<ReturnType<typeof runWith>>

/** Nothing of the run is left on the host, every backup is there and what it was, and the next one is right. */
async function expectSound(task: Task, outcome: Outcome): Promise<void> {
  const { place, error } = outcome
  const { storage: path, stateDir, disk } = at(place)
  const storage = new LocalDriver({ path })
  const { ok, runs } = await recover({ stateDir, storages: [storage] })
  const isHalf = task.restores && runs.some(run => run.outcome === 'incomplete')
  expect(isVarveError(error) && error.context.incomplete !== undefined).toBe(isHalf ?? false)
  if (isHalf) {
    await expect(backup(place, storage)).rejects.toMatchObject({ code: 'DISK_INCOMPLETE' })
    await restoreOver(place, storage, { inPlace: true })
    expect(await recover({ stateDir, storages: [storage] })).toEqual({ ok: true, runs: [] })
  } else expect(ok).toBe(true)
  // Restored in place, or not at all where an error does not say so.
  const isRestored =
    isHalf || (task.restores && !(isVarveError(error) && error.context.restored === undefined))
  const holds = (isRestored && contents.get(ids[1] ?? '')) || now
  expect((await readdir(place)).filter(name => name !== 'state').sort()).toEqual(['disk.qcow2', 'storage'])
  expect(await readdir(join(stateDir, 'runs'))).toEqual([])
  expect((await content(place)).equals(holds)).toBe(true)
  await checkQcow2(disk)
  const next = await backup(place, storage)
  const { backups, damaged } = await new ChainManager({ storage }).list()
  expect(damaged).toEqual([])
  const there = backups.map(({ manifest }) => manifest.id).filter(id => id !== next.id)
  expectThere(there, task, outcome)
  for (const { manifest, folder } of backups) {
    if (contents.has(manifest.id)) await expectUntouched(path, folder)
    else expect((await restore(place, storage, manifest.id)).equals(holds), manifest.id).toBe(true) // of the disk as it is
  }
  expect(backups.at(-1)?.manifest.id).toBe(next.id)
  const { stdout } = await execa('qemu-img', ['info', '--output=json', disk])
  const { bitmaps } = JSON.parse(stdout)['format-specific'].data
  const bitmap = `varve-${next.id}`
  const names = bitmaps.map(({ name }: { name: string }) => name).sort()
  // A seal is there where a bitmap had bits when the backup was complete.
  const others = names.filter((name: string) => name !== `${bitmap}-seal`)
  expect(others).toEqual([bitmap, twinOf(bitmap, await diskMark('vda', disk))])
}

/** Every object of a backup is, byte for byte, as it was in the template, where the backup can be restored. */
async function expectUntouched(path: string, backup: string): Promise<void> {
  const before = join(at(join(folder, 'template')).storage, backup)
  for (const name of await readdir(before)) {
    const [was, is] = await Promise.all(
      [join(before, name), join(path, backup, name)].map(one => readFile(one)),
    )
    expect(is && was?.equals(is), `${backup}/${name}`).toBe(true)
  }
}

/** A backup that was damaged on its way is told from a good one once it is read, and nothing else has suffered. */
async function expectDamageFound({ place, result }: Outcome): Promise<void> {
  const damaged = isBackup(result) ? result.id : expect.fail('it is no backup')
  const storage = new LocalDriver({ path: at(place).storage })
  const report = await new ChainManager({ storage }).verify(damaged, { deep: true })
  expect(report.problems.map(({ code }) => code)).toEqual(['DIGEST_MISMATCH'])
  await expect(restore(place, storage, damaged)).rejects.toMatchObject({ code: 'DIGEST_MISMATCH' })
  const next = await backup(place, storage, { type: 'full' })
  for (const id of [...ids, next.id])
    expect((await restore(place, storage, id)).equals(contents.get(id) ?? now), id).toBe(true)
  expect(await recover({ stateDir: at(place).stateDir, storages: [storage] })).toEqual({ ok: true, runs: [] })
}

/** What a task was to remove is gone, or where it failed may be; every other backup is there, and what it made. */
function expectThere(there: readonly string[], { name, removes }: Task, { result, error }: Outcome): void {
  const gone = removes?.() ?? []
  const kept = ids.filter(id => !gone.includes(id))
  expect(there).toEqual(expect.arrayContaining(kept))
  const others = there.filter(id => !kept.includes(id))
  if (error === undefined) {
    // A prune leaves a chain alone in which it finds damage, and says so.
    const removed = isReport(result) && result.damaged.length > 0 ? result.removed : undefined
    const spared = gone.filter(id => removed?.every(({ manifest }) => manifest.id !== id))
    expect(others).toEqual([...spared, ...(isBackup(result) ? [result.id] : [])])
  } else {
    const made = others.filter(id => !gone.includes(id))
    expect(made.length).toBeLessThanOrEqual(/full backup|increment/.test(name) ? 1 : 0)
  }
}

function isReport(result: unknown): result is PruneReport {
  return result !== null && typeof result === 'object' && 'removed' in result
}

function isBackup(result: unknown): result is BackupManifest {
  return result !== null && typeof result === 'object' && 'id' in result
}

// All of them take some minutes each, on a busy machine more.
const TIMEOUT_MS = (wanted === undefined ? 5 : 60) * 60_000

test.each(TASKS)(
  'whatever the storage does during $name, it is an error or it is right',
  {
    timeout: TIMEOUT_MS,
  },
  async task => {
    const { calls, error, result, place } = await runWith(task, -1)
    expect(error).toBeUndefined()
    if (isBackup(result))
      expect(`${task.name} is ${result.kind}`).toMatch(/a full backup is full|an increment.* is incremental/)
    expect(calls.length).toBeGreaterThan(2)
    const all = calls.flatMap((call, index) => FAULTS[call.operation].map(fault => ({ call, index, fault })))
    const cases =
      wanted === undefined || wanted === 'all' ? all : all.filter(({ fault }) => fault.kind === wanted)
    const random = new Random(seed)
    const sizes = await sizesOf(place)
    while (wanted === undefined && cases.length > (task.sample ?? SAMPLE))
      cases.splice(random.below(cases.length), 1)
    for (const { call, index, fault: kind } of cases) {
      const fault = somewhere(kind, random, sizes.get(call.key))
      const outcome = await runWith(task, index, fault)
      try {
        if (outcome.error !== undefined) expect(outcome.error).toBeInstanceOf(VarveError)
        else if (damages(fault, call) && task.readsBack === false) {
          await expectDamageFound(outcome)
          continue
        } else {
          expect(damages(fault, call), 'damage that nobody noticed').toBe(false)
          // Several objects are read at once: this time it may have been another one. An image is read to digest all of it;
          // what its header says is read after that.
          const hit = outcome.calls[index] ?? call
          const times = (all: readonly StorageCall[]) => all.filter(one => isLike(one, hit)).length
          const isFirst = times(outcome.calls.slice(0, index)) === 0
          const isIn = 'offset' in fault && fault.offset < (sizes.get(hit.key) ?? 0)
          const damaged = task.name === 'a deep verification' && isFirst && isIn && alters(fault, hit)
          const again = times(outcome.calls) > times(calls)
          expect(damaged && !again, 'damage that a verification read only once').toBe(false)
        }
        await expectSound(task, outcome)
      } catch (cause) {
        const offset = 'offset' in fault ? ` ${fault.offset}` : ''
        const text = `${fault.kind}${offset} at call ${index}, ${call.operation} ${call.key} (VARVE_SEED=${seed}): ${cause instanceof Error ? cause.message : cause}`
        throw new Error(text, { cause: outcome.error ?? cause })
      }
    }
  },
)

// A driver is to list what was put at once; see docs/storage-driver.md. What comes of one that does not:
test('behind a listing that lags a backup is right, and what cannot be right says so', async () => {
  const place = await load()
  const real = new LocalDriver({ path: at(place).storage })
  let lags = false
  const newDriver = () =>
    new FaultyDriver(real, ({ operation }) =>
      lags && operation === 'list' ? { kind: 'stale', changes: Number.POSITIVE_INFINITY } : undefined,
    )
  const lagging = newDriver()
  const unseen = await backup(place, lagging)
  expect(unseen).toMatchObject({ kind: 'incremental', parent: ids[2] })
  lags = true
  await expect(restore(place, lagging, unseen.id)).rejects.toMatchObject({ code: 'BACKUP_NOT_FOUND' })
  const next = await backup(place, lagging)
  expect(next.disks).toMatchObject([{ kind: 'full', fallback: 'bitmap-missing' }])
  // Neither of the two is seen; what is not kept of the others goes, and what they rest on stays.
  await new ChainManager({ storage: lagging }).prune({ instance: INSTANCE, keepLast: 1 })
  for (const { id } of [unseen, next]) expect((await restore(place, real, id)).equals(now), id).toBe(true)
  // Nobody can see that another one rests on it: that one is lost, and is never taken for whole.
  await new ChainManager({ storage: lagging }).delete(ids[2] ?? '')
  await expect(restore(place, real, unseen.id)).rejects.toMatchObject({ code: 'CHAIN_BROKEN' })
  expect((await new ChainManager({ storage: real }).verify(unseen.id)).ok).toBe(false)
  expect((await restore(place, real, next.id)).equals(now)).toBe(true)
  // A backup that is gone is no parent where it is still shown.
  const gone = await backup(place, real)
  lags = false
  const second = newDriver()
  await new ChainManager({ storage: second }).delete(gone.id)
  lags = true
  const last = await backup(place, second)
  expect(last.parent).not.toBe(gone.id)
  expect((await restore(place, real, last.id)).equals(now)).toBe(true)
})

/** The sizes of a storage's objects, by key. */
async function sizesOf(place: string): Promise<Map<string, number>> {
  const sizes = new Map<string, number>()
  for await (const { key, size } of new LocalDriver({ path: at(place).storage }).list(''))
    sizes.set(key, size)
  return sizes
}

/** A fault of an object's bytes, at any of them. */
function somewhere(fault: Fault, random: Random, size = 1): Fault {
  return 'offset' in fault ? { ...fault, offset: random.below(size) } : fault
}

/** Whether a fault makes bytes that are stored other ones. A download has the damage only where it reads that byte. */
function damages(fault: Fault, call: StorageCall): boolean {
  return call.operation === 'put' && changes(fault) && /\.(qcow2|blake3)$/.test(call.key)
}

/** Whether a fault changes what is downloaded of the backup that is verified, and has a digest. */
function alters(fault: Fault, { operation, key }: StorageCall): boolean {
  const isOfChain = ids.slice(0, 2).some(id => key.includes(`/${id}/`))
  return operation === 'get' && changes(fault) && isOfChain && !key.endsWith('/manifest.json')
}

function changes({ kind }: Fault): boolean {
  return kind === 'flip-bit' || kind === 'end-at' || kind === 'append'
}

function isLike(one: StorageCall, other: StorageCall): boolean {
  return one.operation === other.operation && one.key === other.key
}
