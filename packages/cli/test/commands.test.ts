import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { createWriteStream } from 'node:fs'
import { mkdir, mkdtemp, readdir, rm, utimes, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { LocalDriver } from '@varve/driver-local'
import { afterEach, beforeEach, expect, test } from 'vitest'
import { dayId, storeFake, storeFakeChain } from '../../core/test/fake-backup.ts'
import manifest from '../package.json' with { type: 'json' }
import { type CliOptions, type CliResult, cli } from './test-terminal.ts'

let folder: string
let storage: LocalDriver
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'varve-cli-'))
  await mkdir(join(folder, 'nas'))
  storage = new LocalDriver({ path: join(folder, 'nas') })
  await configure({ storages: { nas: { type: 'local', path: join(folder, 'nas') } } })
})
afterEach(() => rm(folder, { recursive: true }))

async function configure(config: object): Promise<void> {
  const stateDir = join(folder, 'state')
  await writeFile(join(folder, 'varve.config.json'), JSON.stringify({ stateDir, ...config }))
}

const run = (args: string, options: Partial<CliOptions> = {}): Promise<CliResult> =>
  cli(args.split(' '), { cwd: folder, ...options })

test('varve without a command shows its help and is a usage error', async () => {
  const result = await run('--config x')
  expect(result).toMatchObject({ code: 2, stdout: '' })
  expect(result.stderr).toContain('Usage: varve')
})

test('the version is that of the package', async () => {
  expect(await run('--version')).toEqual({ code: 0, stdout: `${manifest.version}\n`, stderr: '' })
})

test.each(['backup', 'restore', 'list', 'show', 'verify', 'delete', 'prune', 'recover', 'storage check'])(
  'varve %s --help has an example and the options of every command',
  async command => {
    const result = await run(`${command} --help`)
    expect(result).toMatchObject({ code: 0, stderr: '' })
    expect(result.stdout).toContain(`Usage: varve ${command}`)
    expect(result.stdout).toMatch(new RegExp(`Examples?:\\n {2}varve ${command}`))
    for (const option of ['--config', '--json', '--verbose']) expect(result.stdout).toContain(option)
  },
)

test('list shows the backups, and the damaged ones with their reason last', async () => {
  await storeFakeChain(storage, [1, 2])
  await storeFake(storage, { id: dayId(3), instance: 'db-1' })
  const damaged = await storeFake(storage, { id: dayId(4) })
  await writeFile(join(folder, 'nas', damaged.folder, 'manifest.json'), '{ "version": 1 }')

  const { code, stdout } = await run('list')
  const lines = stdout.split('\n')
  expect(code).toBe(0)
  expect(lines[0]).toMatch(/^BACKUP +INSTANCE +KIND +STATE OF +AGE +DISKS +STORED +PARENT$/)
  expect(lines[1]).toMatch(new RegExp(`^${dayId(1)} +web-1 +full .* vda +100 B$`))
  expect(lines[2]).toMatch(new RegExp(`^${dayId(2)} +web-1 +incremental .* 100 B +${dayId(1)}$`))
  expect(lines[3]).toMatch(new RegExp(`^${dayId(3)} +db-1 +full`))
  expect(lines.slice(4).join('\n')).toContain(`${damaged.folder}/manifest.json: `)

  const one = await run('list db-1')
  expect(one.stdout).toContain(dayId(3))
  expect(one.stdout).not.toContain(dayId(1))
  expect((await run('list nobody')).stdout).toContain('There are no backups of nobody')
})

test('a name with control characters does not reach the terminal as it is', async () => {
  const { manifest, folder: key } = await storeFake(storage, { id: dayId(1) })
  const [disk] = manifest.disks
  const evil = { ...manifest, disks: [{ ...disk, source: { path: '/\u001b[2J\u0007', format: 'raw' } }] }
  await writeFile(join(folder, 'nas', key, 'manifest.json'), JSON.stringify(evil))
  const { stdout } = await run(`show ${dayId(1)}`)
  // biome-ignore lint/suspicious/noControlCharactersInRegex: control characters are what is looked for
  expect(stdout).not.toMatch(/[\u0000-\u0009\u000b-\u001f\u007f]/)
})

test('with --json standard output is one document, whatever the command and its outcome', async () => {
  await storeFakeChain(storage, [1, 2])
  const document = async (args: string, code: number) => {
    const result = await run(`${args} --json`)
    expect(result, args).toMatchObject({ code })
    return JSON.parse(result.stdout)
  }
  expect(await document('list', 0)).toMatchObject({
    backups: [{ id: dayId(1) }, { id: dayId(2), parent: dayId(1) }],
    damaged: [],
  })
  expect(await document(`show ${dayId(2)}`, 0)).toMatchObject({ version: 1, id: dayId(2) })
  expect(await document(`verify ${dayId(2)}`, 0)).toMatchObject({ ok: true, chain: [dayId(1), dayId(2)] })
  expect(await document('prune --keep-last 1 --dry-run', 0)).toMatchObject({ dryRun: true, removed: [] })
  expect(await document('recover', 0)).toEqual({ ok: true, runs: [] })
  expect(await document('storage check', 0)).toMatchObject({ ok: true, type: 'local' })
  expect(await document(`delete ${dayId(1)} -y`, 1)).toMatchObject({ error: { code: 'CHAIN_DEPENDENCY' } })
  expect(await document(`delete ${dayId(1)}`, 2)).toMatchObject({ error: { code: 'INVALID_ARGUMENT' } })
  expect(await document(`restore ${dayId(2)} --to-instance web-1`, 2)).toMatchObject({
    error: { code: 'INVALID_ARGUMENT', message: expect.stringContaining('Add --yes') },
  })
  expect(await document(`delete ${dayId(2)} -y`, 0)).toEqual({ deleted: dayId(2) })
  expect(await document('frobnicate', 2)).toMatchObject({ error: { code: 'USAGE' } })
  expect(await document('list --config missing.json', 2)).toMatchObject({ error: { code: 'INVALID_CONFIG' } })
})

test('with --json standard output is one document also where help or the version is shown', async () => {
  for (const args of ['--json', 'storage --json', '--json help nope', 'storage nope --json']) {
    const { code, stdout } = await run(args)
    expect(code, args).toBe(2)
    expect(JSON.parse(stdout), args).toEqual({
      error: { code: 'USAGE', message: expect.stringMatching(/command/) },
    })
  }
  for (const args of ['list --help --json', '--json list -h', 'help list --json']) {
    const { code, stdout } = await run(args)
    expect(code, args).toBe(0)
    expect(JSON.parse(stdout), args).toEqual({ help: expect.stringContaining('Usage: varve list') })
  }
  expect(JSON.parse((await run('--version --json')).stdout)).toEqual({ version: manifest.version })
})

test.each([
  ['list', ''],
  ['list --json', ''],
  ['--help', ''],
  ['--version --json', ''],
  ['frobnicate --json', 'Error: Unknown command'],
])('varve %s on a full disk fails and says that its output is not there', async (args, also) => {
  const output = createWriteStream('/dev/full').on('error', () => undefined)
  const { code, stderr } = await run(args, { output })
  expect(code).toBe(also === '' ? 1 : 2)
  expect(stderr).toContain(also)
  expect(stderr.match(/Error: /g)).toHaveLength(also === '' ? 1 : 2)
  expect(stderr).toMatch(/Error: The result could not be written.*ENOSPC.*\n {2}code: OUTPUT_FAILED\n$/)
})

test('a result that nobody waits for any more is no failure', async () => {
  const reader = spawn('true', { stdio: ['pipe', 'ignore', 'ignore'] })
  await once(reader, 'close')
  const output = reader.stdin.on('error', () => undefined)
  expect(await run('list', { output })).toEqual({ code: 0, stdout: '', stderr: '' })
})

test('a configuration that is a folder is told with the file to name', async () => {
  const result = await run(`list --config ${folder}`)
  expect(result).toMatchObject({ code: 2, stdout: '' })
  expect(result.stderr).toContain(
    `${folder} is a folder. Name the file in it, such as ${folder}/varve.config.json`,
  )
})

test('verify tells of damage by exit code and names the object', async () => {
  const [full = ''] = await storeFakeChain(storage, [1, 2])
  await storage.delete(`${full}/vda.qcow2`)
  const result = await run(`verify ${dayId(2)}`)
  expect(result.code).toBe(1)
  expect(result.stdout).toContain('DAMAGED')
  expect(result.stdout).toContain(`${full}/vda.qcow2`)
})

test('show says what a backup rests on, also where that is broken', async () => {
  const [full = ''] = await storeFakeChain(storage, [1, 2, 3])
  expect((await run(`show ${dayId(3)}`)).stdout).toMatch(`Rests on  ${dayId(2)}, ${dayId(1)}`)
  await storage.delete(`${full}/manifest.json`)
  expect(await run(`show ${dayId(3)}`)).toMatchObject({
    code: 0,
    stdout: expect.stringMatching(/Rests on {2}a broken chain: .+/),
  })
})

test('prune --dry-run tells what goes and why the others stay, and touches nothing', async () => {
  await storeFakeChain(storage, [1, 2])
  await storeFakeChain(storage, [3, 4])
  const before = await readdir(join(folder, 'nas'), { recursive: true })
  const { code, stdout } = await run('prune web-1 --keep-last 1 --dry-run')
  expect(code).toBe(0)
  const fates = stdout.split('\n').map(line => [line.slice(0, 26), line.split('100 B').at(1)?.trim()])
  expect(fates.slice(1, 5)).toEqual([
    [dayId(1), 'REMOVE'],
    [dayId(2), 'REMOVE'],
    [dayId(3), 'keep: ancestor'],
    [dayId(4), 'keep: last'],
  ])
  expect(stdout).toContain('2 backups would be removed and 200 B freed; 2 backups would stay.')
  expect(await readdir(join(folder, 'nas'), { recursive: true })).toEqual(before)

  expect((await run('prune web-1 --keep-last 1')).stdout).toContain('2 backups removed and 200 B freed')
  const left = await run('list --json')
  expect(JSON.parse(left.stdout).backups).toMatchObject([{ id: dayId(3) }, { id: dayId(4) }])
})

test('prune removes what an unfinished backup has left once it is as old as is said', async () => {
  const { folder: key } = await storeFake(storage, { id: dayId(1) })
  await storage.delete(`${key}/manifest.json`)
  const threeHoursAgo = Date.now() / 1000 - 3 * 3600
  for (const name of await readdir(join(folder, 'nas', key)))
    await utimes(join(folder, 'nas', key, name), threeHoursAgo, threeHoursAgo)
  const garbage = async (args: string) =>
    JSON.parse((await run(`prune --keep-last 1 --dry-run --json${args}`)).stdout).garbage
  expect(await garbage('')).toEqual([])
  expect(await garbage(' --garbage-age 4')).toEqual([])
  expect(await garbage(' --garbage-age 2')).toMatchObject([{ folder: key }])
  expect((await run('prune --keep-last 1 --garbage-age 0')).code).toBe(2)
})

test('prune without a rule is refused, and says which there are', async () => {
  await storeFakeChain(storage, [1])
  const result = await run('prune')
  expect(result.code).toBe(2)
  expect(result.stderr).toMatch(/last, daily, weekly, monthly or yearly/)
  expect((await run('prune --keep-last -1')).code).toBe(2)
  expect((await run('prune --keep-last 1 --time-zone Mars/Olympus')).code).toBe(2)
})

test('on a terminal a deletion is done when it is confirmed, and only then', async () => {
  await storeFakeChain(storage, [1])
  const refused = await run(`delete ${dayId(1)}`)
  expect(refused).toMatchObject({ code: 2, stderr: expect.stringContaining('--yes') })
  for (const typed of ['', 'n\n', 'web-2\n', '\n']) {
    const declined = await run(`delete ${dayId(1)}`, { typed })
    expect(declined).toMatchObject({ code: 1, stderr: expect.stringContaining('nothing was changed') })
  }
  expect((await run('list')).stdout).toContain(dayId(1))
  const confirmed = await run(`delete ${dayId(1)}`, { typed: 'web-1\n' })
  expect(confirmed).toMatchObject({ code: 0, stderr: expect.stringContaining('100 B') })
  expect(await readdir(join(folder, 'nas'))).toEqual([])
})

test('a backup that is damaged, or has lost its manifest, is deleted once it is confirmed by its id', async () => {
  const [id, damages] = [dayId(1), ['{', '{ "version": 2 }', undefined]]
  for (const damage of damages) {
    const { folder: key } = await storeFake(storage, { id })
    if (damage === undefined) await storage.delete(`${key}/manifest.json`)
    else await writeFile(join(folder, 'nas', key, 'manifest.json'), damage)
    for (const name of await readdir(join(folder, 'nas', key)))
      await utimes(join(folder, 'nas', key, name), 0, 0) // nobody is writing it
    const refused = await run(`delete ${id}`)
    expect(refused).toMatchObject({ code: 2, stderr: expect.stringContaining('Add --yes') })
    const declined = await run(`delete ${id}`, { typed: 'web-1\n' })
    expect(declined).toMatchObject({ code: 1, stderr: expect.stringMatching(/cannot be read.*manifest/s) })
    expect(await readdir(join(folder, 'nas', key))).toContain('vda.qcow2')
    expect(await run(`delete ${id}`, { typed: `${id}\n` })).toMatchObject({ code: 0 })
    expect(await readdir(join(folder, 'nas'))).toEqual([])
  }
  const missing = await run(`delete ${id}`)
  expect(missing).toMatchObject({ code: 1, stderr: expect.stringContaining('There is no backup') })
})

test.each([
  ['', /^The disks vda, vdb, vdc of web-2 will be replaced by the backup of web-1 from /],
  ['--disks vdb', /^The disk vdb of web-2 will be replaced by /],
  [
    '--disks vda,vdc --in-place',
    /^The disks vda, vdc of web-2 will be overwritten in place with .*incomplete\.$/m,
  ],
  ['--with-definition', /^The disks vda, vdb, vdc of web-2 and its definition will be replaced/],
])('before varve restore --to-instance %s it is asked for what will happen', async (args, question) => {
  await storeFake(storage, { id: dayId(1), disks: ['vda', 'vdb', 'vdc'] })
  const result = await run(`restore ${dayId(1)} --to-instance web-2 ${args}`.trim(), { typed: 'no\n' })
  expect(result).toMatchObject({ code: 1, stderr: expect.stringMatching(question) })
})

test('Ctrl-C at the question is no answer', async () => {
  await storeFakeChain(storage, [1])
  let interrupted = false
  const result = await run(`delete ${dayId(1)}`, {
    typed: '',
    open: true,
    onStderr: (text, interrupt) => {
      if (interrupted || !text.includes('to go on')) return
      interrupted = true
      interrupt('SIGINT')
    },
  })
  expect(result).toMatchObject({ code: 1, stderr: expect.stringContaining('Stopped by Ctrl-C') })
  expect((await run('list')).stdout).toContain(dayId(1))
})

test('the configuration, the state folder and the storage may be chosen by option and environment', async () => {
  await mkdir(join(folder, 'tape'))
  await storeFake(new LocalDriver({ path: join(folder, 'tape') }), { id: dayId(7) })
  const local = (path: string) => ({ type: 'local', path: join(folder, path) })
  await configure({ storages: { nas: local('nas'), tape: local('tape') } })
  expect(await run('list')).toMatchObject({ code: 2, stderr: expect.stringContaining('nas, tape') })
  expect((await run('list --storage tape')).stdout).toContain(dayId(7))
  expect((await run('list -s nas')).stdout).toContain('There are no backups')

  const elsewhere = { cwd: tmpdir(), env: { VARVE_CONFIG: join(folder, 'varve.config.json') } }
  expect((await run('list -s tape', elsewhere)).stdout).toContain(dayId(7))
  expect(await run('list -s tape --config none.json', elsewhere)).toMatchObject({ code: 2 })
})

test.each([
  ['--to-disk vda=a --to-instance web-1', 'exactly one'],
  ['--to-instance web-1 --overwrite', '--overwrite'],
  ['--to-instance web-1 --format raw', '--format'],
  ['--to-new-instance web-2', '--directory'],
  ['--to-disk vda=a --directory /x', '--directory'],
  ['--to-disk vda=a --with-definition', '--with-definition'],
  ['--to-disk vda=a --no-start', '--no-start'],
  ['--to-disk vda=a --shutdown-timeout 5', '--shutdown-timeout'],
  ['--to-new-instance web-2 --directory /x --shutdown-timeout 5', '--shutdown-timeout'],
  ['--to-new-instance web-2 --directory /x --in-place', '--in-place does not go with --to-new-instance'],
  ['--to-disk vda=a --to-disk vda=b', 'twice'],
  ['--to-disk ../vda=a', 'vda=/srv'],
  ['--to-disk vda=', 'vda=/srv'],
  ['--to-disk vda=a --disks ,', 'vda,vdb'],
  ['--to-disk vda=a --format vmdk', 'raw'],
  ['--to-disk vda=a --shutdown-timeout 0', 'at least 1'],
])('varve restore %s is a usage error that says why', async (args, named) => {
  const result = await run(`restore ${dayId(1)} ${args}`)
  expect(result).toMatchObject({ code: 2, stdout: '' })
  expect(result.stderr).toContain(named)
})

test.each([
  ['--bandwidth fast', 'such as 50M'],
  ['--cluster-size 3K', 'power of two'],
  ['--concurrency 0', 'at least 1'],
  ['--max-chain 1.5', 'whole number'],
  ['--rbd-snapshots 0', 'whole number'],
  ['--freeze maybe', 'require'],
  ['--disk vda=a --disk vda=b', 'twice'],
  ['--freeze require', '--freeze does not go with --disk'],
  ['--overlay-folder /x', '--overlay-folder does not'],
  ['--overlay-reserve 1G', '--overlay-reserve does not'],
  ['--libvirt-uri test:///default', '--libvirt-uri does not'],
])('varve backup %s is a usage error that says why', async (args, named) => {
  const result = await run(`backup web-1 ${args} --disk vdz=x`)
  expect(result).toMatchObject({ code: 2, stdout: '' })
  expect(result.stderr).toContain(named)
})

/** Leaves the journal of a backup that was cut short before it was known whether it is published. */
async function leaveJournal(id: string, location: string): Promise<void> {
  const journal = [
    {
      ...{ version: 1, id, kind: 'backup', instance: 'web-1' },
      host: { kind: 'image', instance: 'web-1', disks: { vda: join(folder, 'vda.qcow2') } },
      storage: { type: 'local', location },
      disks: [{ name: 'vda', path: join(folder, 'vda.qcow2') }],
      startedAt: '2026-01-01T00:00:00.000Z',
    },
    { step: 'publish', manifest: `web-1/${id}/${id}/manifest.json`, size: 1, blake3: '00', retire: {} },
  ]
  await mkdir(join(folder, 'state', 'runs'), { recursive: true })
  const lines = journal.map(line => `${JSON.stringify(line)}\n`)
  await writeFile(join(folder, 'state', 'runs', `${id}.jsonl`), lines.join(''))
}

test('recover settles what it can; what needs a person is exit code 3 and stays', async () => {
  await leaveJournal(dayId(1), join(folder, 'nas'))
  await leaveJournal(dayId(2), '/mnt/unplugged')
  const result = await run('recover')
  expect(result.code).toBe(3)
  expect(result.stdout).toMatch(new RegExp(`${dayId(1)} +backup +web-1 +undone`))
  expect(result.stdout).toMatch(new RegExp(`${dayId(2)} +backup +web-1 +UNRESOLVED: .*/mnt/unplugged`))
  expect(await readdir(join(folder, 'state', 'runs'))).toEqual([`${dayId(2)}.jsonl`])
  const again = await run('recover --json')
  expect(again.code).toBe(3)
  expect(JSON.parse(again.stdout)).toMatchObject({
    ok: false,
    runs: [{ id: dayId(2), outcome: 'unresolved', error: { code: 'RUN_UNRESOLVED' } }],
  })
})

test('recover says on standard error that there is no state folder, as where its name is mistyped', async () => {
  const other = join(folder, 'other')
  const missing = await run(`recover --state-dir ${other}`)
  expect(missing).toMatchObject({ code: 0, stdout: expect.stringContaining('Nothing to recover') })
  expect(missing.stderr).toContain(`${other} is not there`)
  await mkdir(other)
  expect((await run(`recover --state-dir ${other}`)).stderr).toBe('')
})

test('recover does without a storage that cannot be opened', async () => {
  await configure({
    storages: {
      far: { type: 'sftp', host: 'far', username: 'me', password: { env: 'NOT_SET' } },
      nas: { type: 'local', path: join(folder, 'nas') },
    },
  })
  const result = await run('recover')
  expect(result).toMatchObject({ code: 0, stdout: expect.stringContaining('Nothing to recover') })
  expect(result.stderr).toMatch(/far is left out: .*NOT_SET/)
})

test('recover --orphans does nothing where a storage cannot be opened, and says so', async () => {
  await leaveJournal(dayId(1), join(folder, 'nas'))
  await configure({
    storages: {
      nas: { type: 'local', path: join(folder, 'nas') },
      far: { type: 'sftp', host: 'far', username: 'me', password: { env: 'NOT_SET' } },
    },
  })
  const result = await run('recover --orphans --json')
  expect(result.code).toBe(2)
  expect(JSON.parse(result.stdout)).toMatchObject({
    error: { code: 'INVALID_CONFIG', message: expect.stringMatching(/far cannot be opened: .*NOT_SET/) },
  })
  expect(await readdir(join(folder, 'state', 'runs'))).toEqual([`${dayId(1)}.jsonl`])
})

test.each([
  ['a host needs attention too', 3, '/mnt/unplugged'],
  ['all runs are settled', 1, undefined],
] as const)(
  'recover --orphans tells what it recovered though the search fails, where %s',
  async (_, code, lost) => {
    await leaveJournal(dayId(1), join(folder, 'nas'))
    if (lost) await leaveJournal(dayId(2), lost)
    const local = (path: string) => ({ type: 'local', path: join(folder, path) })
    await configure({ storages: { nas: local('nas'), gone: local('gone') } })
    const result = await run('recover --orphans --json')
    expect(result.code, result.stderr).toBe(code)
    expect(result.stderr).toMatch(/^Error: .*\/gone.*\n {2}code: STORAGE_NOT_FOUND\n$/m)
    expect(JSON.parse(result.stdout)).toMatchObject({
      ok: lost === undefined,
      runs: [{ id: dayId(1), outcome: 'undone' }, ...(lost ? [{ id: dayId(2), outcome: 'unresolved' }] : [])],
      error: { code: 'STORAGE_NOT_FOUND', context: { path: join(folder, 'gone') } },
    })
    const text = await run('recover --orphans')
    expect(text).toMatchObject({
      code,
      stdout: expect.stringContaining(lost ? 'UNRESOLVED' : 'Nothing to recover'),
    })
  },
)
