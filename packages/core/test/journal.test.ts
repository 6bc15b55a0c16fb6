import {
  appendFile,
  mkdtemp,
  readdir,
  readFile,
  rename,
  rm,
  stat,
  truncate,
  writeFile,
} from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { FUZZ_TIMEOUT_MS, fuzz } from '@varve/testkit'
import fc from 'fast-check'
import { afterEach, beforeEach, expect, test } from 'vitest'
import { newBackupId } from '../src/backup-id.ts'
import { fileIdentity } from '../src/bitmap-twin.ts'
import { JOURNAL_STEPS, type JournalHeader, type JournalStep, RunJournal } from '../src/journal.ts'
import { recover } from '../src/recover.ts'
import { assertNoUnsettledRun } from '../src/unsettled.ts'

let stateDir: string
beforeEach(async () => {
  stateDir = await mkdtemp(join(tmpdir(), 'varve-journal-'))
})
afterEach(() => rm(stateDir, { recursive: true }))

/** The journals that another process finds. */
async function unsettled(): Promise<(RunJournal | undefined)[]> {
  const ids = await RunJournal.unsettled(stateDir)
  return Promise.all(ids.map(id => RunJournal.read(stateDir, id)))
}

function header(path = '/img/a.qcow2'): JournalHeader {
  return {
    version: 1,
    id: newBackupId(),
    kind: 'backup',
    instance: 'web-1',
    host: { kind: 'libvirt', uri: 'qemu:///system' },
    storage: { type: 'local', location: '/mnt/backup' },
    disks: [{ name: 'vda', path }],
    startedAt: new Date().toISOString(),
  }
}

test('another process reads every step that was recorded, in order', async () => {
  const head = header()
  const journal = await RunJournal.begin(stateDir, head)
  await journal.record({ step: 'bitmap-add', bitmap: 'varve-x', disks: ['vda'] })
  await journal.record({ step: 'export', folder: '/tmp/x' })
  const [found] = await unsettled()
  expect(found?.header).toEqual(head)
  expect(found?.steps).toEqual([
    { step: 'bitmap-add', bitmap: 'varve-x', disks: ['vda'] },
    { step: 'export', folder: '/tmp/x' },
  ])
  expect(found?.of('export')).toEqual([{ step: 'export', folder: '/tmp/x' }])
})

test('a journal that somebody removes in the middle of its run is whole again with the next step', async () => {
  const head = header()
  const journal = await RunJournal.begin(stateDir, head)
  await journal.record({ step: 'export', folder: '/tmp/x' })
  const file = join(stateDir, 'runs', `${head.id}.jsonl`)
  await rm(file)
  await journal.record({ step: 'upload', folder: 'web-1/x' })
  expect((await unsettled())[0]?.steps).toHaveLength(2)
  await rm(stateDir, { recursive: true })
  await journal.record({ step: 'undo' })
  const [found] = await unsettled()
  expect(found?.header).toEqual(head)
  expect(found?.steps).toEqual([
    { step: 'export', folder: '/tmp/x' },
    { step: 'upload', folder: 'web-1/x' },
    { step: 'undo' },
  ])
  expect((await stat(file)).mode & 0o777).toBe(0o600)
  await journal.record({ step: 'defined' })
  expect((await unsettled())[0]?.steps).toHaveLength(4)
})

test('every kind of step is read with all that it tells', async () => {
  const of = { instance: 'web-1', disk: 'vda' }
  const steps: JournalStep[] = [
    { step: 'bitmap-add', bitmap: 'varve-x', disks: ['vda'] },
    { step: 'filesystem-freeze' },
    { step: 'filesystem-thawed' },
    { step: 'suspend' },
    { step: 'snapshot', overlays: [{ disk: 'vda', base: '/a', baseFormat: 'raw', overlay: '/a.x' }] },
    {
      step: 'snapshot',
      overlays: [
        {
          disk: 'vda',
          base: '/dev/dm-1',
          baseFormat: 'raw',
          overlay: '/a.x',
          definition: '<domain/>',
          device: 'device LVM-a',
          folder: '7 8',
        },
      ],
    },
    { step: 'frozen', bases: [{ overlay: '/a.x', identity: '5 6', writtenAt: '9' }] },
    { step: 'rbd-snapshot', snapshot: 'varve-x', disks: [{ disk: 'vda', image: 'pool/vda' }] },
    { step: 'resumed' },
    { step: 'export', folder: '/tmp/x' },
    { step: 'upload', folder: 'web-1/x/x' },
    {
      step: 'publish',
      manifest: 'm',
      size: 7,
      blake3: 'b',
      parent: 'p',
      retire: { vda: ['b'] },
      retireSnapshots: { vdb: ['s'] },
    },
    { step: 'published' },
    { step: 'merging', overlay: '/a.x' },
    { step: 'pivot', overlay: '/a.x' },
    { step: 'merged', overlay: '/a.x' },
    { step: 'unmerged', overlay: '/a.x' },
    { step: 'define', instance: 'web-1', xml: '<domain/>' },
    { step: 'drop-backing', instance: 'web-1', disks: ['vda'] },
    { step: 'power-off', instance: 'web-1', wasRunning: true, start: false, timeoutMs: 5 },
    { step: 'powered-off' },
    { step: 'target-create', temporary: '/a.new', folder: '7 8' },
    { step: 'target-create', temporary: '/b.new' },
    { step: 'image-create', image: 'pool/a.new', of },
    { step: 'image-create', image: 'pool/b.new' },
    { step: 'mark-incomplete', disk: 'vda', path: '/a', identity: '5 6', mark: 'b', former: ['c'] },
    { step: 'write-in-place', disk: 'vda', path: '/dev/a' },
    { step: 'write-in-place', disk: 'vda', path: '/a', identity: '5 6', folder: '7 8' },
    { step: 'write-in-place', disk: 'vdb', path: 'rbd:pool/b', identity: '5e', of },
    { step: 'written-in-place' },
    { step: 'incomplete', disks: ['vda'] },
    {
      step: 'finish',
      renames: [
        { temporary: '/a.new', target: '/a', identity: '5 6', isNew: true },
        { temporary: '/b.new', target: '/b' },
        { temporary: '/c.new', target: '/c', replaces: { identity: '5 6', writtenAt: '9' } },
      ],
      images: [
        { image: 'pool/a.new', target: 'pool/a', id: '1f', isNew: false, of },
        { image: 'pool/b.new', target: 'pool/b', id: '2f', replaces: { id: '3f', writtenAt: 'today' } },
        { image: 'pool/c.new', target: 'pool/c', id: '4f', replaces: { id: '5f' } },
      ],
    },
    { step: 'defined' },
    { step: 'undo' },
  ]
  expect(new Set(steps.map(({ step }) => step))).toEqual(new Set(JOURNAL_STEPS))
  for (const host of [
    { kind: 'libvirt', uri: 'qemu:///system' },
    { kind: 'image', instance: 'web-1', disks: { vda: '/a', vdb: { path: '/b', format: 'raw' } } },
  ] as const) {
    const journal = await RunJournal.begin(stateDir, { ...header(), host })
    for (const step of steps) await journal.record(step)
    const [found] = await unsettled()
    expect(found?.header).toEqual(journal.header)
    expect(found?.steps).toEqual(steps)
    await journal.settled()
  }
})

test('a step whose record was cut short at any byte was never begun', async () => {
  const head = header()
  const journal = await RunJournal.begin(stateDir, head)
  await journal.record({ step: 'export', folder: '/tmp/x' })
  const file = join(stateDir, 'runs', `${head.id}.jsonl`)
  const whole = await readFile(file)
  const firstLine = whole.indexOf('\n') + 1
  for (let length = whole.length - 1; length >= firstLine; length--) {
    await truncate(file, length)
    const [found] = await unsettled()
    expect(found?.steps).toEqual([])
  }
  await truncate(file, firstLine - 1)
  expect(await unsettled()).toEqual([undefined])
})

test('a step that is recorded after one that was cut short is read all the same', async () => {
  const head = header()
  const journal = await RunJournal.begin(stateDir, head)
  await journal.record({ step: 'export', folder: '/tmp/x' })
  const file = join(stateDir, 'runs', `${head.id}.jsonl`)
  await appendFile(file, '{"step":"finish","renames":[{"tempo')
  const [found] = await unsettled()
  await found?.record({ step: 'undo' })
  const [again] = await unsettled()
  expect(again?.steps).toEqual([{ step: 'export', folder: '/tmp/x' }, { step: 'undo' }])
})

test('a settled run leaves nothing', async () => {
  const journal = await RunJournal.begin(stateDir, header())
  await journal.settled()
  expect(await readdir(join(stateDir, 'runs'))).toEqual([])
  expect(await RunJournal.unsettled(stateDir)).toEqual([])
})

test('a disk with an unsettled run is refused, another disk is not, nor is that of another instance which has its name by now', async () => {
  const check = (path: string, name = 'vda', instance?: { name: string; uuid?: string }) =>
    assertNoUnsettledRun(stateDir, instance, [{ name, path }])
  const unresolved = { code: 'RUN_UNRESOLVED' }
  const web1 = { name: 'web-1' }
  const former = await RunJournal.begin(stateDir, header('/img/a.qcow2')) // by a version that recorded no UUID
  await expect(check('/img/a.qcow2')).rejects.toMatchObject(unresolved)
  await check('/img/b.qcow2')
  // The same disk of the instance, which somebody's snapshot has put on another file.
  await expect(check('/img/a.snapshot', 'vda', web1)).rejects.toMatchObject(unresolved)
  await expect(check('/img/a.snapshot', 'vda', { ...web1, uuid: 'a' })).rejects.toMatchObject(unresolved)
  await check('/img/b.qcow2', 'vdb', web1)
  await check('/img/b.qcow2', 'vda', { name: 'web-2' })
  await former.settled()
  await check('/img/a.qcow2', 'vda', web1)

  await RunJournal.begin(stateDir, { ...header('/img/a.qcow2'), uuid: 'a' })
  await expect(check('/img/a.snapshot', 'vda', { ...web1, uuid: 'a' })).rejects.toMatchObject(unresolved)
  await check('/img/b.qcow2', 'vda', { ...web1, uuid: 'b' })
  await expect(check('/img/a.qcow2', 'vda', { ...web1, uuid: 'b' })).rejects.toMatchObject(unresolved)
})

test('a disk that a restore in place left incomplete is refused until it is another one, or to be restored', async () => {
  const path = join(stateDir, 'vda.img')
  await writeFile(path, 'half')
  const disks = [
    { name: 'vda', path },
    { name: 'vdb', path: 'rbd:pool/b' },
    { name: 'vdc', path: '/img/c' },
  ]
  const journal = await RunJournal.begin(stateDir, { ...header(), kind: 'restore', disks })
  await journal.record({ step: 'write-in-place', disk: 'vda', path, identity: await fileIdentity(path) })
  await journal.record({ step: 'write-in-place', disk: 'vdb', path: 'rbd:pool/b', identity: '5e' })
  const vda = { name: 'vda', path }
  const vdb = { name: 'vdb', path: 'rbd:pool/b', state: { id: '5e' } }
  const check = (disk: typeof vda | typeof vdb, restored: { path: string }[] = []) =>
    assertNoUnsettledRun(stateDir, { name: 'web-1' }, [disk], restored)
  await expect(check(vda, [vda])).rejects.toMatchObject({ code: 'RUN_UNRESOLVED' }) // it may be written to still
  await journal.record({ step: 'incomplete', disks: ['vda', 'vdb'] })
  await expect(check(vda)).rejects.toMatchObject({
    code: 'DISK_INCOMPLETE',
    message: expect.stringContaining(`runs/${journal.header.id}.jsonl`),
    context: { disk: 'vda', path, run: journal.header.id },
  })
  await expect(check(vdb)).rejects.toMatchObject({ code: 'DISK_INCOMPLETE', context: { disk: 'vdb' } })
  await check(vda, [vda])
  await expect(check(vda, [vdb])).rejects.toMatchObject({ code: 'DISK_INCOMPLETE' })
  await check({ name: 'vdc', path: '/img/c' })
  await check({ ...vdb, state: { id: '6f' } }) // made anew under its name
  await rename(path, `${path}.old`)
  await writeFile(path, 'another file')
  await check(vda)
  await journal.record({ step: 'incomplete', disks: ['vda'] })
  await check(vdb)
})

test('a journal that cannot be read is an error and not an empty list', async () => {
  const head = header()
  await RunJournal.begin(stateDir, head)
  await appendFile(join(stateDir, 'runs', `${head.id}.jsonl`), 'not json\n')
  await expect(unsettled()).rejects.toMatchObject({ code: 'RUN_UNRESOLVED' })
  const check = (path: string) => assertNoUnsettledRun(stateDir, undefined, [{ name: 'vda', path }])
  await expect(check('/img/a.qcow2')).rejects.toMatchObject({ code: 'RUN_UNRESOLVED' })
  await check('/img/b.qcow2') // what it is about can be read
})

test('a mangled journal is refused, or every step of it is one', { timeout: FUZZ_TIMEOUT_MS }, async () => {
  const journal = await RunJournal.begin(stateDir, header())
  await journal.record({ step: 'bitmap-add', bitmap: 'varve-x', disks: ['vda'] })
  await journal.record({ step: 'power-off', instance: 'web-1', wasRunning: true, start: true, timeoutMs: 1 })
  await journal.record({ step: 'finish', renames: [{ temporary: '/img/a.new', target: '/img/a' }] })
  const path = join(stateDir, 'runs', `${journal.header.id}.jsonl`)
  const lines = (await readFile(path, 'utf8')).trimEnd().split('\n')
  const line = fc.oneof(fc.constantFrom(...lines), fc.json(), fc.string())
  const other = fc.constantFrom('', '{}', '[]', 'null', '7', '"x"', 'true')
  const change = fc.record({ at: fc.nat(), from: fc.nat(), with: other })
  const mangled = fc
    .tuple(fc.array(line, { maxLength: 3 }), fc.array(change, { maxLength: 2 }))
    .map(([more, changes]) => {
      const all = [...lines, ...more]
      for (const { at, from, with: value } of changes) {
        const values = all[at % all.length]?.match(/"[^"]*"|\[[^[\]]*\]|\{[^{}]*\}|true|\d+/g) ?? ['']
        all[at % all.length] = all[at % all.length]?.replace(values[from % values.length] ?? '', value) ?? ''
      }
      return `${all.join('\n')}\n`
    })
  await fc.assert(
    fc.asyncProperty(mangled, async text => {
      await writeFile(path, text)
      const found = await RunJournal.read(stateDir, journal.header.id).catch(error => {
        expect(error).toMatchObject({ name: 'VarveError', code: 'RUN_UNRESOLVED' })
      })
      for (const { header, steps } of found ? [found] : []) {
        expect(
          header.disks.every(({ name, path }) => typeof name === 'string' && typeof path === 'string'),
        ).toBe(true)
        for (const step of steps) expect(JOURNAL_STEPS).toContain(step.step)
        for (const step of steps)
          if (step.step === 'finish')
            for (const { target } of step.renames) expect(target).toBeTypeOf('string')
      }
      await assertNoUnsettledRun(stateDir, { name: 'web-1' }, [{ name: 'vdz', path: '/img/z' }]).catch(
        error => expect(error).toMatchObject({ code: 'RUN_UNRESOLVED' }),
      )
    }),
    fuzz(200),
  )
})

test('files that are no journals are left alone', async () => {
  await RunJournal.begin(stateDir, header())
  await writeFile(join(stateDir, 'runs', 'notes.txt'), 'x')
  expect(await RunJournal.unsettled(stateDir)).toHaveLength(1)
})

test('recover that is given up settles what it has begun and nothing after it', async () => {
  for (const _ of [1, 2, 3])
    await RunJournal.begin(stateDir, { ...header(`/img/${newBackupId()}`), kind: 'restore' })
  const [first] = await unsettled()
  await first?.record({ step: 'finish', renames: [] })
  const given = new AbortController()
  const recovered = recover(
    { stateDir, storages: [] },
    { signal: given.signal, onEvent: () => given.abort(new Error('stop')) },
  )
  await expect(recovered).rejects.toMatchObject({ code: 'ABORTED' })
  expect(await RunJournal.unsettled(stateDir)).toHaveLength(2)
  expect(await recover({ stateDir, storages: [] })).toMatchObject({ ok: true, runs: [{}, {}] })
})
