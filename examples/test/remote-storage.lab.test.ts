import { mkdir, mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { BackupPipeline, ChainManager, LibvirtHost, RestorePipeline, type VarveEvent } from '@varve/core'
import {
  checkQcow2,
  compareImages,
  createQcow2,
  type GuestWriter,
  type LabDomain,
  type LibvirtLab,
  sha256Content,
  startLibvirt,
  watchStaging,
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
const SIZES = { vda: 16 * MIB, vdb: 4 * MIB }

let lab: LibvirtLab
let folder: string
let vm: LabDomain
let writer: GuestWriter

// One guest, that never stops to write to vdb, keeps a chain on each of the storages.
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'varve-remote-'))
  lab = await startLibvirt()
  const disks = await Promise.all(
    Object.entries(SIZES).map(async ([target, size]) => {
      const path = join(folder, `${target}.qcow2`)
      await createQcow2(path, size)
      return { target, path, format: 'qcow2', discard: 'unmap' } as const
    }),
  )
  vm = await lab.createDomain({ name: INSTANCE, disks })
  await vm.boot()
  await vm.run('dd if=/dev/urandom of=/dev/vda bs=1M count=15 conv=fsync')
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

  beforeAll(async () => {
    home = join(folder, type)
    await mkdir(home)
    site = await open(home)
  })
  afterAll(async () => {
    await site?.driver[Symbol.asyncDispose]()
    await site?.[Symbol.asyncDispose]()
  })

  /** The local files that some work leaves data in, be it for a moment; those of a storage that is a folder are none. */
  async function staged<T>(work: () => Promise<T>) {
    const { value, temporary, written } = await watchStaging(work)
    // sockets of qemu-nbd, and the caches of the example's TypeScript
    const files = temporary.filter(name => !/^(varve-nbd|tsx|node)-/.test(name))
    return { value, paths: [...files, ...written.filter(path => !path.startsWith(join(home, 'remote')))] }
  }

  test("the example's backup of the running guest and an increment restore what it had, also without Varve", async () => {
    const script = fileURLToPath(new URL(`../store-remotely/${type}.ts`, import.meta.url))
    const stateDir = join(home, 'state')
    const args = ['--import', 'tsx', script, INSTANCE, ...site.args, stateDir, lab.uri]
    const example = await staged(async () =>
      execa(process.execPath, args, { ...(site.env && { env: site.env }) }),
    )
    expect(example.paths, 'what a full backup has written to local files').toEqual([])
    const { stdout } = example.value
    const [found, ...others] = (await new ChainManager({ storage: site.driver }).list()).backups
    expect(others).toEqual([])
    const full = found?.manifest ?? expect.fail('the storage has no backup')
    expect(full).toMatchObject({ kind: 'full', running: true })
    expect(stdout).toContain(`${full.id} is `)

    const pipelines = { host: new LibvirtHost({ uri: lab.uri }), storage: site.driver, stateDir }
    const backups = new BackupPipeline(pipelines)
    const sum = await inGuest(
      'dd if=/dev/urandom of=/dev/vda bs=64k seek=100 count=20 conv=fsync',
      'dd if=/dev/zero of=/dev/vda bs=1M seek=10 count=2 conv=fsync',
      'blkdiscard -o 4194304 -l 2097152 /dev/vda',
      'dd if=/dev/urandom of=/dev/vda bs=4k seek=2561 count=3 conv=fsync', // inside of what was zeroed
      SUM,
    )
    const { length: flushed } = await writer.writes()
    /** What the storage ran, by the events. */
    const ran: (string | undefined)[] = []
    const onEvent = (event: VarveEvent) =>
      void (event.type === 'command' && event.command === type && ran.push(event.args[0]))
    const increment = await backups.run({ instance: INSTANCE }, { onEvent })
    if (type === 'rclone') expect(ran).toEqual(expect.arrayContaining(['lsjson', 'rcat', 'moveto']))
    expect(increment).toMatchObject({ kind: 'incremental', parent: full.id })
    expect(increment.disks[0]?.storedSize).toBeLessThan(5 * MIB)

    const disks = { vda: join(home, 'vda.qcow2'), vdb: join(home, 'vdb.qcow2') }
    const restores = new RestorePipeline(pipelines)
    const { paths } = await staged(() => restores.run({ backup: increment.id, to: { disks } }, { onEvent }))
    const places = paths.map(path => path.replace(/\.varve-restore-.*$/, ''))
    expect(places, 'what a restore has written to local files').toSatisfy(() =>
      places.every(path => Object.values(disks).includes(path)),
    )
    expect(ran.includes('cat')).toBe(type === 'rclone')
    const files = await site.files()
    for (const [name, path] of Object.entries(disks)) {
      await checkQcow2(path)
      const stored = join(files, INSTANCE, increment.chain, increment.id, `${name}.qcow2`)
      const plain = join(home, `${name}-plain.qcow2`)
      await execa('qemu-img', ['convert', '-f', 'qcow2', '-O', 'qcow2', stored, plain])
      const comparison = await compareImages({ path, format: 'qcow2' }, { path: plain, format: 'qcow2' })
      expect(comparison).toMatchObject({ identical: true })
    }
    expect(await sha256Content(disks.vda, 'qcow2')).toBe(sum)
    const restored = { path: disks.vdb, format: 'qcow2' } as const
    expect(await writtenPrefix(restored, writer, await writer.writes())).toBeGreaterThanOrEqual(flushed)
  })
})
