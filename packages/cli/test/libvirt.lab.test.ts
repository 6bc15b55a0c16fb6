import { mkdir, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { compareImages, createQcow2, type LibvirtLab, qemuIo, startLibvirt } from '@varve/testkit/lab'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { type CliOptions, type CliResult, cli } from './test-terminal.ts'

let lab: LibvirtLab
let folder: string
beforeAll(async () => {
  lab = await startLibvirt()
  folder = await mkdtemp(join(tmpdir(), 'varve-cli-'))
  await mkdir(join(folder, 'nas'))
  const config = {
    storages: { nas: { type: 'local', path: join(folder, 'nas') } },
    stateDir: join(folder, 'state'),
    libvirtUri: lab.uri,
  }
  await writeFile(join(folder, 'varve.config.json'), JSON.stringify(config))
  for (const disk of ['vda', 'vdb']) {
    await createQcow2(join(folder, `${disk}.qcow2`), 16 * 1024 * 1024)
    await qemuIo(join(folder, `${disk}.qcow2`), 'qcow2', ['write -P 0x11 1M 3M'])
  }
  const disk = (target: string) =>
    ({ target, path: join(folder, `${target}.qcow2`), format: 'qcow2' }) as const
  await lab.createDomain({ name: 'web-1', disks: [disk('vda'), disk('vdb')] })
})
afterAll(async () => {
  await lab?.stop()
  await rm(folder, { recursive: true, force: true })
})

const run = (args: string, options: Partial<CliOptions> = {}): Promise<CliResult> =>
  cli(args.split(' '), { cwd: folder, ...options })
const write = (disk: string, pattern: string) =>
  qemuIo(join(folder, `${disk}.qcow2`), 'qcow2', [`write -P ${pattern} 2M 1M`])
const image = (name: string) => ({ path: join(folder, name), format: 'qcow2' }) as const

test('a domain is backed up, and its disks are replaced only when that is confirmed', async () => {
  const taken = await run('backup web-1 --json')
  expect(taken.code, taken.stderr).toBe(0)
  const { id } = JSON.parse(taken.stdout)
  expect(await run(`restore ${id} --to-disk vda=saved.qcow2`)).toMatchObject({ code: 0 })
  await write('vda', '0x22')
  const damaged = async () => !(await compareImages(image('vda.qcow2'), image('saved.qcow2'))).identical
  expect(await damaged()).toBe(true)

  for (const [args, code] of [
    [`restore ${id} --to-instance nobody`, 'INSTANCE_NOT_FOUND'],
    [`restore ${id} --to-instance web-1 --disks vdz`, 'DISK_NOT_FOUND'],
  ] as const) {
    const failed = await run(`${args} --yes --json`)
    expect(failed, args).toMatchObject({ code: 1, stderr: expect.stringContaining(code) })
    expect(JSON.parse(failed.stdout)).toMatchObject({ error: { code } })
  }
  expect(await damaged()).toBe(true)

  const refused = await run(`restore ${id} --to-instance web-1`)
  expect(refused).toMatchObject({ code: 2, stderr: expect.stringContaining('--yes') })
  const declined = await run(`restore ${id} --to-instance web-1`, { typed: 'no\n' })
  expect(declined).toMatchObject({ code: 1, stderr: expect.stringContaining('nothing was changed') })
  expect(await damaged()).toBe(true)

  const confirmed = await run(`restore ${id} --to-instance web-1`, { typed: 'web-1\n' })
  expect(confirmed.code, confirmed.stderr).toBe(0)
  expect(confirmed.stderr).toContain('The disks vda, vdb of web-1 will be replaced')
  expect(confirmed.stderr).not.toContain('another domain')
  expect(await damaged()).toBe(false)

  // The manifest is changed here in place of the domain: one of the same name, but another UUID.
  const path = join(folder, 'nas', 'web-1', id, id, 'manifest.json')
  const manifest = await readFile(path, 'utf8')
  const { uuid } = JSON.parse(manifest).instance
  const former = uuid.replace(/./, (digit: string) => (digit === '0' ? '1' : '0'))
  await writeFile(path, manifest.replace(uuid, former))
  const asked = await run(`restore ${id} --to-instance web-1`, { typed: 'no\n' })
  expect(asked).toMatchObject({
    code: 1,
    stderr: expect.stringContaining(
      `another domain of this name, or web-1 was defined anew since: its UUID was ${former} and is ${uuid} by now.`,
    ),
  })
  await writeFile(path, manifest)

  await write('vda', '0x33')
  expect(await run(`restore ${id} --to-instance web-1 --disks vda --yes --with-definition`)).toMatchObject({
    code: 0,
  })
  expect(await damaged()).toBe(false)
  const next = await run('backup web-1 --type incremental --json')
  expect(JSON.parse(next.stdout)).toMatchObject({ kind: 'incremental', parent: id })
})

test('a backup becomes a new instance', async () => {
  const { id } = JSON.parse((await run('backup web-1 --type full --json')).stdout)
  await mkdir(join(folder, 'copies'))
  const made = await run(`restore ${id} --to-new-instance web-2 --directory copies`)
  expect(made.code, made.stderr).toBe(0)
  expect(await lab.virsh(['domblklist', 'web-2'])).toContain(join(folder, 'copies', 'web-2-vda.qcow2'))
  const { identical } = await compareImages(image('vda.qcow2'), image('copies/web-2-vda.qcow2'))
  expect(identical).toBe(true)
  expect(await run(`restore ${id} --to-new-instance web-2 --directory copies`)).toMatchObject({
    code: 1,
    stderr: expect.stringContaining('TARGET_EXISTS'),
  })
  await lab.virsh(['undefine', 'web-2'])
})

test.each([
  ['backup nobody', 'INSTANCE_NOT_FOUND'],
  ['backup web-1 --disks vdz', 'DISK_NOT_FOUND'],
  ['backup web-1 --libvirt-uri test+unix:///nowhere?socket=/nowhere', 'COMMAND_FAILED'],
])('varve %s fails and says why', async (args, code) => {
  const result = await run(args)
  expect(result).toMatchObject({ code: 1, stdout: '' })
  expect(result.stderr).toContain(code)
})
