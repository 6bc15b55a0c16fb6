import { mkdir, mkdtemp, readFile, rm, unlink } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { type BackupManifest, BackupPipeline, LibvirtHost } from '@varve/core'
import { LocalDriver } from '@varve/driver-local'
import { createQcow2, type LibvirtLab, qemuIo, sha256Content, startLibvirt } from '@varve/testkit/lab'
import { execa } from 'execa'
import { afterAll, beforeAll, expect, test } from 'vitest'

const MiB = 1024 * 1024

let folder: string
let disk: string
let lab: LibvirtLab
let last: BackupManifest
let wanted: string

beforeAll(async () => {
  lab = await startLibvirt()
  folder = await mkdtemp(join(tmpdir(), 'varve-guide-'))
  disk = join(folder, 'web-1.qcow2')
  await mkdir(join(folder, 'storage'))
  await createQcow2(disk, 32 * MiB)
  const vm = await lab.createDomain({
    name: 'web-1',
    guest: false,
    disks: [{ target: 'vda', path: disk, format: 'qcow2' }],
  })
  const host = new LibvirtHost({ uri: lab.uri })
  const storage = new LocalDriver({ path: join(folder, 'storage') })
  const backups = new BackupPipeline({ host, storage, stateDir: join(folder, 'state') })

  await qemuIo(disk, 'qcow2', ['write -P 0x11 0 16M'])
  await backups.run({ instance: 'web-1' })
  await qemuIo(disk, 'qcow2', ['write -P 0x22 1M 1M', 'write -z 4M 1M', 'discard 8M 1M'])
  last = await backups.run({ instance: 'web-1' })
  wanted = await sha256Content(disk, 'qcow2')
  // The host is lost.
  await vm.undefine()
  await unlink(disk)
})
afterAll(async () => {
  await lab.stop()
  await rm(folder, { recursive: true })
})

/** The shell commands of the guide, with the paths of this test. */
async function guide(): Promise<string> {
  const text = await readFile(new URL('../../docs/restoring-without-varve.md', import.meta.url), 'utf8')
  const replacements: [RegExp, string][] = [
    [/cd \/mnt\/backup\S+/, `cd ${join(folder, 'storage', 'web-1', last.chain)}`],
    [/backup=\S+/, `backup=${last.id}`],
    [/\/srv\/images/g, folder],
  ]
  const blocks = [...text.matchAll(/```sh\n([\s\S]*?)```/g)].map(([, block]) => block)
  let script = blocks.join('')
  for (const [pattern, value] of replacements) {
    expect(script).toMatch(pattern)
    script = script.replace(pattern, value)
  }
  return script
}

async function shell(script: string): Promise<string> {
  const { stdout } = await execa('bash', ['-euo', 'pipefail', '-c', script], {
    env: { LIBVIRT_DEFAULT_URI: lab.uri },
    all: true,
  })
  return stdout
}

test('the commands of the guide bring an instance back with nothing but its files', async () => {
  const output = await shell(await guide())
  expect(output).toContain(`backing file: ../${last.parent}/vda.qcow2`)
  expect(output).not.toContain('damaged')
  expect((await lab.virsh(['domstate', 'web-1'])).trim()).toBe('running')
  await lab.virsh(['destroy', 'web-1'])
  expect(await sha256Content(disk, 'qcow2')).toBe(wanted)
  expect(await sha256Content(join(folder, 'web-1.raw'), 'raw')).toBe(wanted)
})

// Last, as it damages the chain.
test('the commands of the guide find a byte that has changed', async () => {
  const image = join(folder, 'storage', 'web-1', last.chain, last.chain, 'vda.qcow2')
  await execa('bash', ['-c', 'printf x | dd of="$0" bs=1 seek=5000000 conv=notrunc', image])
  await expect(shell(await guide())).rejects.toMatchObject({
    stdout: expect.stringMatching(/differ: (byte|char) 33\b/), // of block 1; the word depends on the language
  })
})
