import { mkdir, mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { type BackupManifest, BackupPipeline, ChainManager, LibvirtHost, RestorePipeline } from '@varve/core'
import {
  checkQcow2,
  compareImages,
  createQcow2,
  type GuestWriter,
  type LabDomain,
  type LibvirtLab,
  sha256Content,
  startLibvirt,
  writerBlockSize,
} from '@varve/testkit/lab'
import { execa } from 'execa'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { writtenPrefix } from '../../scripts/demonstration/written-prefix.ts'
import { type RemoteSite, SITES } from './remote-site.ts'

const MIB = 1024 * 1024
const INSTANCE = 'web-1'
/** The SHA-256 of vda, as the guest reads it from its disk. */
const SUM = 'sync && echo 3 > /proc/sys/vm/drop_caches && sha256sum /dev/vda'
const SIZES = { vda: 32 * MIB, vdb: 4 * MIB }

let lab: LibvirtLab
let folder: string
let vm: LabDomain
let writer: GuestWriter

// One guest, that never stops to write to vdb, keeps a chain on each of the storages.
beforeAll(async () => {
  lab = await startLibvirt()
  folder = await mkdtemp(join(tmpdir(), 'varve-remote-'))
  const disks = await Promise.all(
    Object.entries(SIZES).map(async ([target, size]) => {
      const path = join(folder, `${target}.qcow2`)
      await createQcow2(path, size)
      return { target, path, format: 'qcow2', discard: 'unmap' } as const
    }),
  )
  vm = await lab.createDomain({ name: INSTANCE, disks })
  await vm.boot()
  await vm.run('dd if=/dev/urandom of=/dev/vda bs=1M count=24 conv=fsync')
  writer = vm.startWriter({ device: '/dev/vdb', blocks: SIZES.vdb / writerBlockSize })
})
afterAll(async () => {
  await lab?.stop()
  await rm(folder, { recursive: true })
})

/** Does one thing after the other in the guest, and returns the first word of what the last one printed. */
async function inGuest(...commands: string[]): Promise<string> {
  const { stdout } = await vm.run(commands.join(' && '))
  return stdout.trim().split('\n').at(-1)?.split(' ')[0] ?? ''
}

describe.each(Object.entries(SITES))('on %s', (type, open) => {
  let site: RemoteSite
  let home: string
  const stateDir = () => join(home, 'state')

  beforeAll(async () => {
    home = join(folder, type)
    await mkdir(home)
    site = await open(home)
  })
  afterAll(async () => {
    await site?.driver[Symbol.asyncDispose]()
    await site?.[Symbol.asyncDispose]()
  })

  /** Expects a backup to hold what the guest read and had flushed: restored by Varve, and by nothing but qemu-img. */
  async function expectHolds(manifest: BackupManifest, sum: string, flushed: number): Promise<void> {
    const target = await mkdtemp(join(home, 'restored-'))
    const disks = { vda: join(target, 'vda.qcow2'), vdb: join(target, 'vdb.qcow2') }
    const host = new LibvirtHost({ uri: lab.uri })
    const pipeline = new RestorePipeline({ host, storage: site.driver, stateDir: stateDir() })
    await pipeline.run({ backup: manifest.id, to: { disks } })
    const files = await site.files()
    for (const [name, path] of Object.entries(disks)) {
      await checkQcow2(path)
      const stored = join(files, INSTANCE, manifest.chain, manifest.id, `${name}.qcow2`)
      const plain = join(target, `${name}-plain.qcow2`)
      await execa('qemu-img', ['convert', '-f', 'qcow2', '-O', 'qcow2', stored, plain])
      const comparison = await compareImages({ path, format: 'qcow2' }, { path: plain, format: 'qcow2' })
      expect(comparison).toMatchObject({ identical: true })
    }
    expect(await sha256Content(disks.vda, 'qcow2')).toBe(sum)
    expect(await writtenPrefix(disks.vdb, writer, await writer.writes())).toBeGreaterThanOrEqual(flushed)
  }

  test('a full backup and two increments of the running guest restore what it had, also without Varve', async () => {
    const host = new LibvirtHost({ uri: lab.uri })
    const pipeline = new BackupPipeline({ host, storage: site.driver, stateDir: stateDir() })
    const full = await pipeline.run({ instance: INSTANCE })
    await inGuest(
      'dd if=/dev/urandom of=/dev/vda bs=64k seek=100 count=20 conv=fsync',
      'dd if=/dev/zero of=/dev/vda bs=1M seek=10 count=2 conv=fsync',
      'blkdiscard -o 4194304 -l 2097152 /dev/vda',
    )
    const first = await pipeline.run({ instance: INSTANCE })
    const sum = await inGuest(
      'dd if=/dev/urandom of=/dev/vda bs=4k seek=2561 count=3 conv=fsync', // inside of what was zeroed
      'dd if=/dev/urandom of=/dev/vda bs=4k seek=1025 count=3 conv=fsync', // and of what was trimmed
      'blkdiscard -o 20971520 -l 1048576 /dev/vda',
      SUM,
    )
    const { length: flushed } = await writer.writes()
    const second = await pipeline.run({ instance: INSTANCE })
    expect([full.kind, first.kind, second.kind]).toEqual(['full', 'incremental', 'incremental'])
    expect(first.disks[0]?.storedSize).toBeLessThan(5 * MIB)
    await expectHolds(second, sum, flushed)
  })

  test('the example adds to the chain', async () => {
    const sum = await inGuest('dd if=/dev/urandom of=/dev/vda bs=64k seek=40 count=1 conv=fsync', SUM)
    const { length: flushed } = await writer.writes()
    const script = fileURLToPath(new URL(`../store-remotely/${type}.ts`, import.meta.url))
    const args = ['--import', 'tsx', script, INSTANCE, ...site.args, stateDir(), lab.uri]
    const { stdout } = await execa(process.execPath, args, { ...(site.env && { env: site.env }) })
    const { backups } = await new ChainManager({ storage: site.driver }).list()
    expect(backups).toHaveLength(4)
    const manifest = backups.at(-1)?.manifest ?? expect.fail('no backup')
    expect(manifest).toMatchObject({ kind: 'incremental', parent: backups[2]?.manifest.id })
    expect(stdout).toContain(`${manifest.id} is `)
    await expectHolds(manifest, sum, flushed)
  })
})
