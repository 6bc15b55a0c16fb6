import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { execa } from 'execa'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { RbdSite } from '../../ceph/test/rbd-site.ts'
import { type CliResult, cli } from './test-terminal.ts'

const MIB = 1024 ** 2
const IMAGE = 'vms/tenant/disk'

let site: RbdSite
let folder: string

beforeAll(async () => {
  site = await RbdSite.start()
  folder = await mkdtemp(join(tmpdir(), 'varve-cli-rbd-'))
  const { ceph, user } = site
  const config = {
    storages: { nas: { type: 'local', path: join(folder, 'nas'), create: true } },
    stateDir: join(folder, 'state'),
    ceph: { conf: ceph.conf, user: user.user, key: { env: 'CEPH_KEY' } },
  }
  await writeFile(join(folder, 'varve.config.json'), JSON.stringify(config))
  await ceph.run('rbd', 'namespace', 'create', 'vms/tenant')
})
afterAll(async () => {
  await site[Symbol.asyncDispose]()
  await rm(folder, { recursive: true })
})

/** The block of shell commands of a page with a word in it, with the paths of this test. */
async function guide(page: string, word: string, replacements: [RegExp, string][]): Promise<string> {
  const text = await readFile(new URL(`../../../docs/${page}`, import.meta.url), 'utf8')
  const blocks = [...text.matchAll(/```sh\n([\s\S]*?)```/g)].flatMap(([, block = '']) => block)
  let script = blocks.find(block => block.includes(word)) ?? ''
  for (const [pattern, value] of replacements) {
    expect(script).toMatch(pattern)
    script = script.replace(pattern, value)
  }
  return script
}

/** What commands print, with Ceph's own configuration being that of the cluster. */
async function shell(script: string): Promise<string> {
  const env = { CEPH_CONF: site.ceph.conf }
  return (await execa('bash', ['-euo', 'pipefail', '-c', script], { env })).stdout
}

const run = (args: string): Promise<CliResult> =>
  cli(args.split(' '), { cwd: folder, env: { CEPH_KEY: site.user.secret } })

/** The document that a command printed. */
async function json<T>(args: string): Promise<T> {
  const { code, stdout, stderr } = await run(`${args} --json`)
  expect(code, stderr).toBe(0)
  return JSON.parse(stdout)
}

const backup = (options = '') =>
  json<{ id: string; chain: string; kind: string }>(`backup web-1 --disk vda=rbd:${IMAGE}${options}`)

test('an image in a namespace is backed up, restored with Varve and with rbd alone, and tidied up after', async () => {
  await site.ceph.client.create(IMAGE, 12 * MIB)
  await site.write(IMAGE, 'write -P 1 0 5M')
  const full = await backup()
  await site.ceph.client.resize(IMAGE, 16 * MIB)
  await site.write(IMAGE, 'write -P 2 4M 1M', 'discard 0 1M', 'write -P 3 15M 64k')
  const second = await backup()
  expect([full.kind, second.kind]).toEqual(['full', 'incremental'])
  const wanted = await site.bytes(IMAGE)
  expect(await run(`verify ${second.id} --deep`)).toMatchObject({ code: 0 })

  expect(await run(`restore ${second.id} --to-disk vda=rbd:vms/tenant/copy`)).toMatchObject({ code: 0 })
  expect((await site.bytes('vms/tenant/copy')).equals(wanted)).toBe(true)
  expect(await run(`restore ${second.id} --to-disk vda=disk.raw --format raw`)).toMatchObject({ code: 0 })
  expect((await readFile(join(folder, 'disk.raw'))).equals(wanted)).toBe(true)

  const chain = join(folder, 'nas', 'web-1', full.chain)
  const commands = await guide('ceph.md', 'rbd import-diff', [
    [/cd \/mnt\/backup\S+/, `cd ${chain}`],
    [/--size 10G/, '--size 16M'],
    [/20261125-…/, full.id],
    [/20261126-…/, second.id],
  ])
  expect(await shell(commands)).toBe(`${full.id}/vda.rbd-diff t\n${second.id}/vda.rbd-diff f`)
  expect((await site.bytes('vms/web-1-copy')).equals(wanted)).toBe(true)

  const check = await guide('restoring-without-varve.md', 'b3sum', [[/\.qcow2/, '.rbd-diff']])
  expect(await shell(`cd ${chain}\n${check}`)).toBe('')
  const stream = join(chain, second.id, 'vda.rbd-diff')
  const bytes = await readFile(stream)
  await writeFile(stream, bytes.with(bytes.length - 9, 1))
  await expect(shell(`cd ${chain}\n${check}`)).rejects.toMatchObject({
    stdout: expect.stringMatching(`${second.id}//vda.blake3 differ: (byte|char) `), // as the language is
  })
  await writeFile(stream, bytes)

  expect(await run(`delete ${second.id} --yes`)).toMatchObject({ code: 0 })
  const lost = 'varve-20250102-030405-006-abcdef'
  await site.ceph.client.createSnapshot(IMAGE, lost)
  expect(await site.snapshots(IMAGE)).toEqual([`varve-${full.id}`, lost])
  const orphan = { image: IMAGE, snapshot: lost, run: lost.replace('varve-', '') }
  expect(await json('recover --orphans')).toMatchObject({ ok: true, orphans: [orphan] })
  const { stdout, stderr } = await run('recover --orphans')
  expect(stdout).toContain(`  rbd snap rm ${IMAGE}@${lost}`)
  expect(stderr).toContain('Only images that backups name are looked at') // there is no libvirt

  const third = await backup(' --rbd-snapshots 1')
  expect(await site.snapshots(IMAGE)).toEqual([lost, `varve-${third.id}`])

  const missing = await run('backup web-1 --disk vda=rbd:vms/tenant/nothing')
  expect(missing).toMatchObject({ code: 1, stderr: expect.stringContaining('DISK_NOT_FOUND') })
})
