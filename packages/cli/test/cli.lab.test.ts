import {
  chmod,
  chown,
  copyFile,
  lchown,
  mkdir,
  mkdtemp,
  readdir,
  readFile,
  rename,
  rm,
  stat,
  symlink,
  truncate,
  writeFile,
} from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { compareImages, createQcow2, mountTmpfs, qemuIo } from '@varve/testkit/lab'
import { execa } from 'execa'
import { afterAll, afterEach, beforeAll, beforeEach, expect, onTestFinished, test } from 'vitest'
import { type CliOptions, type CliResult, cli } from './test-terminal.ts'

let template: string
let folder: string
beforeAll(async () => {
  template = await mkdtemp(join(tmpdir(), 'varve-cli-disk-'))
  await createQcow2(join(template, 'disk.qcow2'), 64 * 1024 * 1024)
  await qemuIo(join(template, 'disk.qcow2'), 'qcow2', ['write -P 0x11 0 8M', 'write -P 0x22 40M 1M'])
})
afterAll(() => rm(template, { recursive: true }))
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'varve-cli-'))
  await mkdir(join(folder, 'nas'))
  const config = {
    storages: { nas: { type: 'local', path: join(folder, 'nas') } },
    stateDir: join(folder, 'state'),
  }
  await writeFile(join(folder, 'varve.config.json'), JSON.stringify(config))
  await copyFile(join(template, 'disk.qcow2'), join(folder, 'disk.qcow2'))
})
afterEach(() => rm(folder, { recursive: true }))

const run = (args: string, options: Partial<CliOptions> = {}): Promise<CliResult> =>
  cli(args.split(' '), { cwd: folder, ...options })
const backup = (more = '') => run(`backup web-1 --disk vda=disk.qcow2 --json${more}`)
const manifestOf = ({ code, stdout, stderr }: CliResult): { id: string; kind: string } => {
  expect(code, stderr).toBe(0)
  return JSON.parse(stdout) // exactly one document
}

async function expectSame(file: string, format: 'qcow2' | 'raw' = 'qcow2'): Promise<void> {
  const disk = { path: join(folder, 'disk.qcow2'), format: 'qcow2' } as const
  const { identical, message } = await compareImages(disk, { path: join(folder, file), format })
  expect(identical, message).toBe(true)
}

test('images are backed up, listed, shown, verified, backed up again and restored', async () => {
  const full = manifestOf(await backup())
  expect(full.kind).toBe('full')
  await qemuIo(join(folder, 'disk.qcow2'), 'qcow2', ['write -P 0x33 1M 2M', 'write -z 4M 1M'])
  const next = manifestOf(await backup(' --type incremental'))
  expect(next.kind).toBe('incremental')

  const list = await run('list')
  expect(list).toMatchObject({ code: 0 })
  expect(list.stdout).toContain(full.id)
  expect(list.stdout).toContain(next.id)
  expect((await run(`show ${next.id}`)).stdout).toContain(full.id)
  expect(await run(`verify ${next.id} --deep`)).toMatchObject({ code: 0 })

  expect(await run(`restore ${next.id} --to-disk vda=new.qcow2`)).toMatchObject({ code: 0 })
  await expectSame('new.qcow2')
  expect(await run(`restore ${next.id} --to-disk vda=new.raw --format raw`)).toMatchObject({ code: 0 })
  await expectSame('new.raw', 'raw')
})

test('an existing file is never overwritten without being asked', async () => {
  const { id } = manifestOf(await backup())
  await writeFile(join(folder, 'mine.qcow2'), 'precious')
  const refused = await run(`restore ${id} --to-disk vda=mine.qcow2 --json`)
  expect(refused).toMatchObject({ code: 1, stderr: expect.stringContaining('TARGET_EXISTS') })
  expect(JSON.parse(refused.stdout)).toMatchObject({
    error: { code: 'TARGET_EXISTS', context: { path: join(folder, 'mine.qcow2') }, retryable: false },
  })
  expect((await stat(join(folder, 'mine.qcow2'))).size).toBe(8)
  expect(await run(`restore ${id} --to-disk vda=mine.qcow2 --overwrite`)).toMatchObject({ code: 0 })
  await expectSame('mine.qcow2')
})

test('a backup that others rest on is not deleted, and prune keeps what the kept ones need', async () => {
  const full = manifestOf(await backup())
  await qemuIo(join(folder, 'disk.qcow2'), 'qcow2', ['write -P 0x44 2M 1M'])
  const next = manifestOf(await backup())
  expect(await run(`delete ${full.id} --yes`)).toMatchObject({
    code: 1,
    stderr: expect.stringContaining(next.id),
  })
  const dry = await run('prune web-1 --keep-last 1 --dry-run --json')
  expect(JSON.parse(dry.stdout)).toMatchObject({ removed: [] })
  expect(await run(`delete ${next.id} --yes`)).toMatchObject({ code: 0 })
  expect(await run(`delete ${full.id} --yes`)).toMatchObject({ code: 0 })
  expect(await readdir(join(folder, 'nas'))).toEqual([])
})

test.each([
  ['backup web-1 --disk vda=missing.qcow2', 1, 'DISK_NOT_FOUND'],
  ['backup web-1 --disk vda=disk.qcow2 --disks vdb', 1, 'DISK_NOT_FOUND'],
  ['backup web-1 --disk vda=disk.qcow2 --type incremental', 1, 'PARENT_MISSING'],
  ['backup web-1 --disk vda=disk.qcow2 --type sometimes', 2, 'sometimes'],
  ['backup web-1 --disk vda', 2, 'vda=/srv'],
  ['backup web-1 --disk vda=disk.qcow2 --storage tape', 2, 'nas'],
  ['show 20260101-000000-000-000000', 1, 'BACKUP_NOT_FOUND'],
  ['show ../../etc/passwd', 2, 'id'],
  ['restore 20260101-000000-000-000000', 2, '--to-disk'],
  ['explode', 2, 'explode'],
  ['list --config missing.json', 2, 'missing.json'],
])('varve %s ends with %i and names it', async (args, code, named) => {
  const result = await run(args)
  expect(result).toMatchObject({ code, stdout: '' })
  expect(result.stderr).toContain(named)
  expect(result.stderr).not.toMatch(/^\s+at /m)
  expect(await readdir(join(folder, 'nas'))).toEqual([])
})

test('a cluster size that is too small for the disk is a usage error, and nothing is touched', async () => {
  await createQcow2(join(folder, 'large.qcow2'), 16 * 2 ** 40)
  const before = await readFile(join(folder, 'large.qcow2'))
  const result = await run('backup web-1 --disk vda=large.qcow2 --cluster-size 4K')
  expect(result).toMatchObject({ code: 2, stdout: '' })
  expect(result.stderr).toContain('a cluster size of 8192 bytes')
  expect(before.equals(await readFile(join(folder, 'large.qcow2')))).toBe(true)
  expect(await readdir(join(folder, 'nas'))).toEqual([])
  expect(await readdir(folder)).not.toContain('state')
})

test('a raw disk that ends within a sector comes back with zeros at its end, and the backup says so', async () => {
  const odd = Buffer.alloc(70_001, 0x55)
  await writeFile(join(folder, 'odd.img'), odd)
  const result = await run('backup web-1 --disk vda=odd.img,format=raw --json')
  const { id } = manifestOf(result)
  expect(result.stderr).toMatch(/odd\.img\) has 70001 bytes.* with 143 zero bytes more/)
  expect((await run(`restore ${id} --to-disk vda=new.img --format raw`)).code).toBe(0)
  const restored = await readFile(join(folder, 'new.img'))
  expect(restored.equals(Buffer.concat([odd, Buffer.alloc(143)]))).toBe(true)
})

test('an image on a read-only file system is named, with what to do', async () => {
  const disk = await mountTmpfs('size=1m')
  onTestFinished(() => disk.dispose())
  const image = join(disk.path, 'disk.qcow2')
  await createQcow2(image, 1024 * 1024)
  await execa('mount', ['-o', 'remount,ro', disk.path])
  const { code, stderr } = await run(`backup web-1 --disk vda=${image}`)
  expect(code).toBe(1)
  expect(stderr).toMatch(new RegExp(`The image ${image} does not take the bitmap.* is not mounted read-only`))
  expect(await readdir(join(folder, 'nas'))).toEqual([])
  expect(await readdir(join(folder, 'state', 'runs'))).toEqual([])
})

test('a damaged image is found by a deep verification and refused by a restore', async () => {
  const manifest = manifestOf(await backup())
  const image = join(folder, 'nas', 'web-1', manifest.id, manifest.id, 'vda.qcow2')
  const { size } = await stat(image)
  await execa('bash', ['-c', `printf '\\x55' | dd of=${image} bs=1 seek=${size - 100} conv=notrunc`])
  expect((await run(`verify ${manifest.id}`)).code).toBe(0)
  expect(await run(`verify ${manifest.id} --deep`)).toMatchObject({ code: 1 })
  const refused = await run(`restore ${manifest.id} --to-disk vda=out.qcow2 --json`)
  expect(refused).toMatchObject({ code: 1, stderr: expect.stringContaining('DIGEST_MISMATCH') })
  expect(JSON.parse(refused.stdout)).toMatchObject({ error: { code: 'DIGEST_MISMATCH' } })
  await truncate(image, size - 1)
  expect(await run(`verify ${manifest.id}`)).toMatchObject({ code: 1 })
  expect(await run(`restore ${manifest.id} --to-disk vda=out.qcow2`)).toMatchObject({
    code: 1,
    stderr: expect.stringContaining('SIZE_MISMATCH'),
  })
  expect((await readdir(folder)).filter(name => name.startsWith('out'))).toEqual([])
})

test('Ctrl-C during a backup leaves nothing: no object, no bitmap, no server, no journal', async () => {
  const before = await execa('qemu-img', ['info', '--output=json', join(folder, 'disk.qcow2')])
  let interrupted = false
  const result = await run('backup web-1 --disk vda=disk.qcow2 --bandwidth 1M', {
    onStderr: (text, interrupt) => {
      if (interrupted || !text.includes('Uploading')) return
      interrupted = true
      interrupt('SIGINT')
    },
  })
  expect(result).toMatchObject({ code: 1, stderr: expect.stringContaining('Stopped by Ctrl-C') })
  expect(await readdir(join(folder, 'nas'))).toEqual([])
  expect(await readdir(join(folder, 'state', 'runs'))).toEqual([])
  const after = await execa('qemu-img', ['info', '--output=json', join(folder, 'disk.qcow2')])
  const bitmaps = (info: string) => JSON.parse(info)['format-specific'].data.bitmaps
  expect(bitmaps(after.stdout)).toEqual(bitmaps(before.stdout))
  expect((await execa('pgrep', ['-f', `qemu-nbd.*${folder}`], { reject: false })).stdout).toBe('')
})

test('the storage is checked', async () => {
  expect(await run('storage check nas')).toMatchObject({ code: 0 })
  await rm(join(folder, 'nas'), { recursive: true })
  expect(await run('storage check nas')).toMatchObject({ code: 1 })
})

test("another user's configuration in the current folder runs nothing unless it is named", async () => {
  const place = join(folder, 'shared')
  const config = join(place, 'varve.config.json')
  const program = join(folder, 'program')
  await mkdir(place)
  await writeFile(program, `#!/bin/sh\ntouch ${folder}/ran\nexit 1\n`, { mode: 0o755 })
  const content = JSON.stringify({ storages: { x: { type: 'rclone', remoteName: 'x', command: program } } })
  const list = async (options: string[] = []) => {
    await rm(join(folder, 'ran'), { force: true })
    const { code, stderr } = await cli(['list', ...options], { cwd: place })
    return {
      code,
      refused: stderr.includes('is not used, since'),
      ran: (await readdir(folder)).includes('ran'),
    }
  }
  const used = { code: 1, refused: false, ran: true }
  const refused = { code: 2, refused: true, ran: false }
  const [nobody, open, sticky] = [65_534, 0o777, 0o1777]

  await writeFile(config, content)
  expect(await list()).toEqual(used)
  for (const mode of [0o664, 0o646]) {
    await chmod(config, mode)
    expect(await list()).toEqual(refused)
  }
  await chmod(config, 0o644)
  for (const mode of [open, 0o775]) {
    await chmod(place, mode) // somebody else could put one of root's files there
    expect(await list()).toEqual(refused)
  }
  await chmod(place, sticky)
  expect(await list()).toEqual(used)
  await chown(config, nobody, nobody)
  expect(await list()).toEqual(refused)
  expect(await list(['--config', config])).toEqual(used)

  await rename(config, join(folder, 'theirs.json'))
  await symlink(join(folder, 'theirs.json'), config) // the file is theirs
  expect(await list()).toEqual(refused)
  await chown(join(folder, 'theirs.json'), 0, 0)
  expect(await list()).toEqual(used)
  await lchown(config, nobody, nobody) // the link is theirs
  expect(await list()).toEqual(refused)
  await rm(config)
  await execa('mkfifo', [config])
  await chown(config, nobody, nobody) // would never be open
  expect(await list()).toEqual(refused)
  await rm(config)
  await writeFile(config, content)
  await chmod(place, 0o755)
  await chown(place, nobody, nobody)
  expect(await list()).toEqual(refused)
})
