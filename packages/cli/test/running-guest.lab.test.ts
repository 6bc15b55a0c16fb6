import { chmod, copyFile, mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createQcow2, type LabDomain, type LibvirtLab, sha256Content, startLibvirt } from '@varve/testkit/lab'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { type CliResult, cli } from './test-terminal.ts'

let lab: LibvirtLab
let vm: LabDomain
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
  const path = join(folder, 'vda.qcow2')
  await createQcow2(path, 16 * 1024 * 1024)
  vm = await lab.createDomain({ name: 'web-1', disks: [{ target: 'vda', path, format: 'qcow2' }] })
  await vm.boot()
})
afterAll(async () => {
  await lab?.stop()
  await rm(folder, { recursive: true, force: true })
})

const run = (args: string): Promise<CliResult> => cli(args.split(' '), { cwd: folder })
const write = (at: number) => vm.run(`dd if=/dev/urandom of=/dev/vda bs=1M count=2 seek=${at} conv=fsync`)
async function sum(): Promise<string> {
  return (await vm.run('echo 3 > /proc/sys/vm/drop_caches; sha256sum /dev/vda')).stdout.slice(0, 64)
}

/** The one document on standard output. */
async function json(args: string, code = 0) {
  const result = await run(`${args} --json`)
  expect(result.code, result.stderr).toBe(code)
  return JSON.parse(result.stdout)
}

test('a backup whose overlay stays ends with 3, and recover merges it', async () => {
  // What libvirt answers where the disk's file system is full, or another job holds the disk.
  const bin = join(folder, 'bin')
  await mkdir(bin)
  await writeFile(
    join(bin, 'virsh'),
    `#!/bin/sh
PATH=\${PATH#*:}
case " $* " in *' blockcommit '*) echo 'error: internal error: no commit today' >&2; exit 1;; esac
exec virsh "$@"
`,
  )
  await chmod(join(bin, 'virsh'), 0o755)
  const { PATH } = process.env
  process.env.PATH = `${bin}:${PATH}`
  let published: string
  try {
    const { error } = await json('backup web-1', 3)
    expect(error).toMatchObject({
      code: 'BLOCK_COMMIT_FAILED',
      message: expect.stringMatching(
        /Block commit failed.*virsh blockcommit failed.*no commit today.*varve recover/s,
      ),
    })
    published = error.context.published
    await write(8) // to the overlay
    expect((await json('backup web-1', 1)).error.code).toBe('OVERLAY_LEFT_OVER')
    expect(await json('recover', 3)).toMatchObject({
      ok: false,
      runs: [{ id: published, outcome: 'unresolved', error: { code: 'BLOCK_COMMIT_FAILED' } }],
    })
  } finally {
    process.env.PATH = PATH
  }
  const { backups } = await json('list web-1')
  expect(backups.map(({ id }: { id: string }) => id)).toContain(published)
  const wanted = await sum()
  expect(await json('recover')).toMatchObject({ ok: true, runs: [{ id: published, outcome: 'finished' }] })
  expect(await run('recover')).toMatchObject({
    code: 0,
    stdout: expect.stringContaining('Nothing to recover'),
  })
  expect(await sum()).toBe(wanted)
  const next = await json('backup web-1')
  expect(next).toMatchObject({ kind: 'incremental', parent: published })
  await json(`restore ${next.id} --to-disk vda=after.qcow2`)
  expect(await sha256Content(join(folder, 'after.qcow2'), 'qcow2')).toBe(wanted)
})

// The last, as nobody waits for the guest to boot again.
test('a running guest is backed up twice, restored to a file, and put back to the first backup', async () => {
  await write(0)
  const first = await sum()
  const full = await json('backup web-1 --type full')
  expect(full).toMatchObject({ kind: 'full', running: true, instance: { name: 'web-1' } })
  await write(4)
  const second = await sum()
  const increment = await json('backup web-1 --type incremental')
  expect(increment).toMatchObject({ kind: 'incremental', parent: full.id })

  const restored = await json(`restore ${increment.id} --to-disk vda=saved.qcow2`)
  expect(restored).toMatchObject({ backup: increment.id, disks: [{ name: 'vda' }], started: false })
  expect(await sha256Content(join(folder, 'saved.qcow2'), 'qcow2')).toBe(second)
  expect(await sum()).toBe(second)

  const back = await json(`restore ${full.id} --to-instance web-1 --yes`)
  expect(back).toMatchObject({ backup: full.id, instance: 'web-1', started: true })
  const copy = join(folder, 'copy.qcow2')
  await copyFile(join(folder, 'vda.qcow2'), copy) // QEMU keeps others from the disk itself
  expect(await sha256Content(copy, 'qcow2')).toBe(first)
})
