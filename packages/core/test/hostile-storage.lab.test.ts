import { execFileSync } from 'node:child_process'
import { once } from 'node:events'
import {
  cp,
  mkdir,
  mkdtemp,
  readdir,
  readFile,
  rm,
  stat,
  symlink,
  truncate,
  writeFile,
} from 'node:fs/promises'
import { createServer } from 'node:net'
import { tmpdir } from 'node:os'
import { basename, join } from 'node:path'
import { LocalDriver } from '@varve/driver-local'
import { createQcow2, qemuIo, sha256Content } from '@varve/testkit/lab'
import { execa } from 'execa'
import { afterAll, beforeAll, expect, onTestFinished, test } from 'vitest'
import { BackupPipeline } from '../src/backup-pipeline.ts'
import { ImageHost } from '../src/image-host.ts'
import type { BackupManifest } from '../src/manifest.ts'
import { type Bundle, bundle } from './bundle.ts'
import { type Attempt, OPERATIONS, type Operation, type Outcome } from './hostile/attempt.ts'
import { CHANGES, changed, written } from './hostile/file-calls.ts'
import { backedBy, ForgedStorage, withDataFile } from './hostile/forged-storage.ts'

const MiB = 1024 * 1024
const GiB = 1024 * MiB

let workshop: string
/** In the workshop: what must not be seen, and the only place where anything may change. */
let [outside, inside] = ['', '']
/** The disk of the instance, as it is after its two backups. */
let disk: string
let pristine: string
let full: BackupManifest
let increment: BackupManifest
/** What the disk held at the increment. */
let wanted: string
/** What does it all, as one file. */
let program: Bundle

beforeAll(async () => {
  workshop = await mkdtemp(join(tmpdir(), 'varve-hostile-'))
  outside = join(workshop, 'outside')
  inside = join(workshop, 'inside')
  for (const folder of [outside, inside, join(inside, 'tmp'), join(workshop, 'storage')]) await mkdir(folder)
  disk = join(inside, 'vda.qcow2')
  pristine = join(workshop, 'pristine.qcow2')
  await createQcow2(disk, 4 * MiB)
  const host = new ImageHost({ instance: 'web-1', disks: { vda: disk } })
  const storage = new LocalDriver({ path: join(workshop, 'storage') })
  const pipeline = new BackupPipeline({ host, storage, stateDir: join(workshop, 'state') })
  await qemuIo(disk, 'qcow2', ['write -P 0x11 0 1M'])
  full = await pipeline.run({ instance: 'web-1' })
  await qemuIo(disk, 'qcow2', ['write -P 0x22 512k 1M', 'write -z 0 64k'])
  increment = await pipeline.run({ instance: 'web-1' })
  wanted = await sha256Content(disk, 'qcow2')
  await cp(disk, pristine)
  await cp(join(workshop, 'storage'), outside, { recursive: true })
  await createQcow2(join(outside, 'secret.qcow2'), 4 * MiB)
  await writeFile(join(outside, 'secret'), 'secret')

  program = await bundle(new URL('./hostile/attacked.ts', import.meta.url))
})
afterAll(async () => {
  await program[Symbol.asyncDispose]()
  await rm(workshop, { recursive: true })
})

/** Tells whether an operation ended as it should. */
type End = (outcome: Outcome) => void

/** An error of this code. */
const code =
  (expected: string): End =>
  ({ code }) =>
    expect(code).toBe(expected)
/** This result. */
const gives =
  (expected: unknown): End =>
  ({ code, result }) =>
    expect({ code, result }).toEqual({ code: undefined, result: expected })
/** An error, or a report of damage. */
const damage: End = ({ code, result }) => expect(code ?? result).not.toEqual([])
/** Any typed error or result, as everything else is looked at for every operation. */
const any: End = () => undefined

/** What an attacker does to the storage, and how the operations on it end. */
interface Attack {
  readonly what: string
  readonly forge: (storage: ForgedStorage) => Promise<unknown>
  readonly ends: Readonly<Partial<Record<Operation, End>>>
}

type Forge = Attack['forge']
type Ends = Attack['ends']

/** One that makes the restore of the disk fail. */
function attack(what: string, restore: string, forge: Forge, more: Ends = {}): Attack {
  const ends = { list: any, verify: damage, restore: code(restore), prune: gives([]) }
  return { what, forge, ends: { ...ends, ...more } }
}

/** One on the definition: put back over the instance, and as a new one. */
function onDefinition(what: string, forge: Forge, over: End, copy: End): Attack {
  return { what: `a definition ${what}`, forge, ends: { over, copy } }
}

function attacks(port: number): Attack[] {
  const secret = join(outside, 'secret')
  const refused = code('INVALID_ARGUMENT')
  const lost = { delete: code('BACKUP_NOT_FOUND') }
  const link = (target: string, path: string) =>
    rm(path, { recursive: true }).then(() => symlink(target, path))
  return [
    { what: 'nothing', forge: async () => undefined, ends: { restore: gives([]), recover: gives([]) } },
    ...namesOf(secret, port).map((name, index) => {
      const of = index % 2 === 0 ? 'full' : 'increment'
      return attack(`the ${of} image backed by ${name}`, 'IMAGE_INVALID', s => s.image(of, backedBy(name)))
    }),
    ...CLAIMS.map(([what, change]) =>
      attack(`an image ${what}`, 'IMAGE_INVALID', s => s.image('full', change)),
    ),
    ...[0, 4].map(bits =>
      attack(`a data file, feature bits ${bits}`, 'IMAGE_INVALID', s =>
        s.image('full', image => {
          withDataFile(secret)(image)
          feature(bits)(image)
        }),
      ),
    ),

    // what a manifest says
    ...[
      ['id', '../../../../outside'],
      ['chain', '../../outside'],
      ['parent', '../../../outside/storage'],
      ['parent', increment.id],
    ].map(([field = '', value]) =>
      attack(`${field} ${value}`, 'MANIFEST_INVALID', s => s.manifest('increment', { [field]: value })),
    ),
    ...[
      ['name', '../../outside/vda'],
      ['image', '../../../../../outside/secret'],
      ['blocks', secret],
      ['backing', secret],
    ].map(([field = '', value]) =>
      attack(`${field} ${value}`, 'MANIFEST_INVALID', s => s.manifest('increment', {}, { [field]: value })),
    ),
    attack('two backups that rest on each other', 'CHAIN_BROKEN', s => {
      const backing = `../${increment.id}/vda.qcow2`
      return s.manifest(
        'full',
        { kind: 'incremental', parent: increment.id },
        { kind: 'incremental', backing },
      )
    }),
    attack('another backup of the same id', 'MANIFEST_INVALID', s => s.addFull('forged', increment), {
      delete: code('MANIFEST_INVALID'),
    }),
    attack(
      'a disk of 8 PiB',
      'IMAGE_INVALID',
      s => s.manifest('increment', {}, { virtualSize: 2 ** 53 - 512 }),
      {
        backup: gives(['disk-shrunk']),
      },
    ),
    attack('an image of 8 PiB', 'CHAIN_BROKEN', s => s.manifest('full', {}, { storedSize: 2 ** 53 - 1 })),
    attack('a list of digests of 2 GiB', 'CHAIN_BROKEN', s => s.manifest('full', {}, ofHoles(4096 * GiB))),
    {
      what: 'an image of holes, and its list of digests',
      forge: async s => {
        await truncate(s.file('full', 'vda.qcow2'), 128 * GiB)
        await truncate(s.file('full', 'vda.blake3'), 64 * MiB)
        await s.manifest('full', {}, ofHoles(128 * GiB))
      },
      ends: { restore: code('DIGEST_MISMATCH') },
    },
    attack('a manifest of 1 GiB', 'MANIFEST_INVALID', s =>
      truncate(s.file('increment', 'manifest.json'), GiB),
    ),
    attack('a manifest that is deep', 'MANIFEST_INVALID', s =>
      writeFile(s.file('increment', 'manifest.json'), '{"disks":['.repeat(50_000)),
    ),
    attack('UEFI variables of 1 GiB', 'MANIFEST_INVALID', s => s.small('nvram', '', GiB)),
    attack('a list of digests that is too long', 'SIZE_MISMATCH', s =>
      truncate(s.file('full', 'vda.blake3'), 64),
    ),
    attack('another list of digests', 'DIGEST_MISMATCH', s =>
      writeFile(s.file('full', 'vda.blake3'), Buffer.alloc(32)),
    ),

    // what lies in the folders
    attack('a link in place of an image', 'OBJECT_NOT_FOUND', s =>
      link(join(outside, 'secret.qcow2'), s.file('full', 'vda.qcow2')),
    ),
    attack(
      'a link in place of a manifest',
      'BACKUP_NOT_FOUND',
      s => link(join(outside, s.key('increment', 'manifest.json')), s.file('increment', 'manifest.json')),
      lost,
    ),
    attack(
      'a link in place of a chain',
      'BACKUP_NOT_FOUND',
      s => link(join(outside, 'web-1', full.id), join(s.path, 'web-1', full.id)),
      lost,
    ),
    attack('a link in place of an instance', 'BACKUP_NOT_FOUND', s =>
      link(join(outside, 'web-1'), join(s.path, 'web-1')),
    ),
    attack('a pipe in place of a manifest', 'BACKUP_NOT_FOUND', async s => {
      await rm(s.file('increment', 'manifest.json'))
      execFileSync('mkfifo', [s.file('increment', 'manifest.json')])
    }),
    {
      what: 'a link to everything',
      forge: s => symlink('/', s.file('increment', 'root')),
      ends: { list: any, verify: gives([]), restore: gives([]), prune: gives([]), delete: any },
    },

    // the definition of the instance
    onDefinition(
      'that names other files',
      s =>
        s.small('definition', definition(fileDisk('disk', 'vdb', secret) + fileDisk('cdrom', 'sda', secret))),
      gives([expect.not.stringContaining(secret)]),
      gives([expect.stringContaining('copy-vda.qcow2')]),
    ),
    onDefinition(
      'whose UEFI variables are a file of the host',
      async s => {
        await s.small('nvram', 'root::0:0::/:/bin/sh')
        await s.small('definition', definition('', `<nvram>${join(outside, 'passwd')}</nvram>`))
      },
      refused,
      gives([expect.not.stringContaining(outside)]),
    ),
    onDefinition(
      'with an external entity',
      s => s.small('definition', `<!DOCTYPE x [<!ENTITY x SYSTEM "file://${secret}">]>${definition('&x;')}`),
      refused,
      refused,
    ),
    onDefinition(
      'with an external document type',
      s => s.small('definition', `<!DOCTYPE x SYSTEM "http://127.0.0.1:${port}/x">${definition()}`),
      refused,
      refused,
    ),
    onDefinition(
      'of a million laughs',
      s => {
        const [a, b] = ['&a;'.repeat(1000), '&b;'.repeat(1000)]
        const entities = `<!ENTITY a "ha"><!ENTITY b "${a}"><!ENTITY c "${b}">`
        return s.small('definition', `<!DOCTYPE x [${entities}]>${definition('&c;')}`)
      },
      refused,
      refused,
    ),
    onDefinition(
      'of 100,000 disks',
      s => s.small('definition', definition('<disk/>'.repeat(100_000))),
      refused,
      refused,
    ),
    onDefinition(
      'of 200 MiB',
      s => s.small('definition', definition(), 200 * MiB),
      code('MANIFEST_INVALID'),
      code('MANIFEST_INVALID'),
    ),

    // what the next backup reads of its parent
    {
      what: 'a map that is none',
      forge: async s => {
        await s.manifest('increment', {}, { map: { key: 'vda.map', size: 3, blake3: '0'.repeat(64) } })
        await writeFile(s.file('increment', 'vda.map'), 'map')
      },
      ends: { verify: damage, backup: gives(['incremental']) },
    },
    {
      what: 'the parent in another chain too',
      forge: s => s.copyChain(increment),
      ends: { backup: gives(['parent-broken']) },
    },
  ]
}

/** Names of files and of servers, as QEMU would follow them. */
function namesOf(secret: string, port: number): string[] {
  return [
    secret,
    `${secret}.qcow2`,
    '../../../../../outside/secret',
    `json:{"driver":"raw","file":{"driver":"file","filename":"${secret}"}}`,
    `file:${secret}`,
    ...['nbd', 'ssh', 'http'].map(scheme => `${scheme}://127.0.0.1:${port}/secret`),
  ]
}

/** What an image may claim of itself. */
const CLAIMS: readonly (readonly [what: string, change: (image: Buffer) => void])[] = [
  ['that is dirty', feature(1)],
  ['that is corrupt', feature(2)],
  ['of unknown features', feature(1 << 30)],
  ['that is encrypted', write32(32, 1)],
  ['with snapshots', write32(60, 1)],
  ['with clusters of 2^63 bytes', write32(20, 63)],
  ['of 2^62 bytes', write64(24, 1n << 62n)],
  ['of 2^64 - 1 bytes', write64(24, (1n << 64n) - 1n)],
  ['with an L1 table of 2^32 entries', write32(36, 0xffffffff)],
  ['with an L1 table far away', write64(40, 1n << 60n)],
  ['with a refcount table of 2^32 clusters', write32(56, 0xffffffff)],
  ['with refcounts of 2^63 bits', write32(96, 63)],
  ['with a header of 4 GiB', write32(100, 0xfffffff8)],
  ['with an L2 table in its header', image => write64(Number(image.readBigUInt64BE(40)), 1n << 63n)(image)],
]

function write64(at: number, value: bigint): (image: Buffer) => void {
  return image => void image.writeBigUInt64BE(value, at)
}

function write32(at: number, value: number): (image: Buffer) => void {
  return image => void image.writeUInt32BE(value, at)
}

/** Sets the incompatible features. */
function feature(bits: number): (image: Buffer) => void {
  return write32(76, bits)
}

/** An image whose blocks are as small as may be: its list of digests is a two-thousandth of it. */
function ofHoles(storedSize: number): Record<string, unknown> {
  return { storedSize, digest: { root: '0'.repeat(64), blockSize: 65_536 } }
}

function fileDisk(device: string, name: string, path: string): string {
  return `<disk type='file' device='${device}'><driver type='qcow2'/><source file='${path}'/><target dev='${name}'/></disk>`
}

/** The instance's definition, and more in it. */
function definition(devices = '', os = ''): string {
  const disks = fileDisk('disk', 'vda', '/images/vda.qcow2')
  return `<domain type='kvm'><name>web-1</name><os>${os}</os><devices>${disks}${devices}</devices></domain>`
}

/** What is in a folder, each name with its size and the time of its last change. */
async function contentOf(folder: string): Promise<string[]> {
  const found: string[] = []
  for (const name of (await readdir(folder, { recursive: true })).sort()) {
    const { size, ctimeMs } = await stat(join(folder, name))
    found.push(`${name} ${size} ${ctimeMs}`)
  }
  return found
}

interface Expected extends Attempt {
  readonly what: string
  readonly end: End
}

/** Makes the storage of each attack, and tells what is to be done with it. */
async function prepare(all: readonly Attack[]): Promise<Expected[]> {
  const attempts: Expected[] = []
  for (const [index, { what, forge, ends }] of all.entries()) {
    const storage = new ForgedStorage(join(inside, `${index}`), full, increment)
    await cp(join(workshop, 'storage'), storage.path, { recursive: true })
    await forge(storage)
    for (const operation of OPERATIONS) {
      const end = ends[operation]
      const target = join(inside, `${index}-${operation}`)
      if (!end) continue
      await mkdir(target)
      const [path, backup] = [storage.path, increment.id]
      attempts.push({
        what,
        end,
        operation,
        storage: path,
        backup,
        target,
        disk,
        pristine,
        definition: definition(),
      })
    }
  }
  return attempts
}

/** Has a process of its own do it all, and tells how each ended and what system calls it and its children made. */
async function carryOut(attempts: readonly Attempt[]): Promise<{ outcomes: Outcome[]; calls: string[] }> {
  const file = (name: string) => join(inside, 'tmp', name)
  await writeFile(file('attempts'), JSON.stringify(attempts))
  await execa(
    'strace',
    [
      ...['--seccomp-bpf', '-f', '-qq', '-y', '-s', '1000', '-o', file('strace')],
      ...['-e', 'signal=none', '-e', `trace=open,openat,openat2,creat,execve,connect,${CHANGES.join(',')}`],
      ...[process.execPath, program.path, file('attempts'), file('outcomes')],
    ],
    { cwd: inside, env: { TMPDIR: join(inside, 'tmp'), PATH: '/usr/bin:/bin' }, timeout: 280_000 },
  )
  return {
    outcomes: JSON.parse(await readFile(file('outcomes'), 'utf8')),
    calls: (await readFile(file('strace'), 'utf8')).split('\n'),
  }
}

/** Whether a path is below `inside`, or a name in a folder that was opened: Linux's way to `openat(2)`. */
function isInside(path: string): boolean {
  return path.startsWith(`${inside}/`) || /^\/proc\/self\/fd\/\d+\/[^/]+$/.test(path)
}

test('a storage in the hands of an attacker leads to nothing outside it, and each attack to the right disk or a typed error', async () => {
  const connections: unknown[] = []
  const server = createServer(socket => connections.push(socket)).listen(0, '127.0.0.1')
  onTestFinished(() => void server.close())
  await once(server, 'listening')
  const address = server.address()
  const attempts = await prepare(attacks(typeof address === 'object' ? (address?.port ?? 0) : 0))
  const before = [await contentOf(outside), await readdir(workshop)]
  const { outcomes, calls } = await carryOut(attempts)

  // Nothing outside was looked for, nothing but what is in `inside` was changed, and no other program was run.
  expect(calls.filter(line => line.includes(outside))).toEqual([])
  expect([await contentOf(outside), await readdir(workshop)]).toEqual(before)
  const opened = written(calls)
  expect(opened.length).toBeGreaterThan(100) // else this would show nothing
  expect(opened.filter(path => !path.startsWith(`${inside}/`))).toEqual([])
  const named = changed(calls, inside)
  expect(named.length).toBeGreaterThan(100)
  expect(named.filter(path => !isInside(path))).toEqual([])
  const programs = calls.flatMap(line => /execve\("([^"]*)"/.exec(line)?.[1] ?? [])
  expect([...new Set(programs.map(path => basename(path)))].sort()).toEqual([
    'node',
    'qemu-img',
    'qemu-io',
    'qemu-nbd',
  ])
  const connects = calls.filter(line => line.includes('connect('))
  expect(connects.filter(line => !line.includes(`{sa_family=AF_UNIX, sun_path="${inside}/`))).toEqual([])
  expect(connections).toEqual([])

  for (const [index, { what, operation, end, target }] of attempts.entries()) {
    const outcome = outcomes[index] ?? expect.fail()
    const label = `${operation}: ${what}`
    expect(outcome.code ?? '', label).toMatch(/^[A-Z_]*$/)
    expect(outcome.ms, label).toBeLessThan(60_000)
    expect(() => end(outcome), label).not.toThrow()
    if (outcome.code !== undefined) expect(await contentOf(target), label).toEqual([])
    else if (operation === 'restore')
      expect(await sha256Content(join(target, 'restored.qcow2'), 'qcow2'), label).toBe(wanted)
  }
  // The largest list of digests that is read has 64 MiB; all else is small.
  const [{ memory: first } = expect.fail()] = outcomes
  expect(Math.max(...outcomes.map(({ memory }) => memory)) - first).toBeLessThan(192 * MiB)
})
