import { mkdir, mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { BackupPipeline, ChainManager, LibvirtHost, RestorePipeline, type VarveEvent } from '@varve/core'
import {
  checkQcow2,
  compareImages,
  createQcow2,
  type LabDomain,
  type LibvirtLab,
  qemuIo,
  sha256Content,
  startLibvirt,
  watchStaging,
  writerBlockSize,
} from '@varve/testkit/lab'
import { execa } from 'execa'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { writtenPrefix } from '../../scripts/demonstration/written-prefix.ts'
import { type RemoteSite, SITES, type SiteType } from './remote-site.ts'

const MIB = 1024 * 1024
const INSTANCE = 'web-1'
/** The SHA-256 of vda, as the guest reads it from its disk. */
const SUM = 'sync && echo 3 > /proc/sys/vm/drop_caches && sha256sum /dev/vda'
const SIZES = { vda: 16 * MIB, vdb: 4 * MIB }

/** Paths by the names of the disks. */
type Disks = Readonly<Record<string, string>>

/** An instance that is backed up. */
interface Subject {
  readonly running: boolean
  readonly disks: Disks
  /** Changes the disks, and gives what tells later whether restored ones have what these have now. */
  change(): Promise<(restored: Disks) => Promise<void>>
}

/** A guest whose first disk changes when it is told to, and that never stops to write to its second one. */
export async function runningGuest(lab: LibvirtLab, folder: string): Promise<Subject> {
  const disks = await createDisks(folder, SIZES)
  const vm = await defineInstance(lab, disks)
  await vm.boot()
  await vm.run('dd if=/dev/urandom of=/dev/vda bs=1M count=15 conv=fsync')
  const writer = vm.startWriter({ device: '/dev/vdb', blocks: SIZES.vdb / writerBlockSize })
  const changes = [
    'dd if=/dev/urandom of=/dev/vda bs=64k seek=100 count=20 conv=fsync',
    'dd if=/dev/zero of=/dev/vda bs=1M seek=10 count=2 conv=fsync',
    'blkdiscard -o 4194304 -l 2097152 /dev/vda',
    'dd if=/dev/urandom of=/dev/vda bs=4k seek=2561 count=3 conv=fsync', // inside of what was zeroed
    SUM,
  ]
  return {
    running: true,
    disks,
    async change() {
      const { stdout } = await vm.run(changes.join(' && '))
      const sum = stdout.trim().split('\n').at(-1)?.split(' ')[0]
      const { length: flushed } = await writer.writes()
      return async ({ vda = '', vdb = '' }) => {
        expect(await sha256Content(vda, 'qcow2')).toBe(sum)
        const image = { path: vdb, format: 'qcow2' } as const
        expect(await writtenPrefix(image, writer, await writer.writes())).toBeGreaterThanOrEqual(flushed)
      }
    },
  }
}

/** An instance that is off, with one disk. */
export async function stoppedInstance(lab: LibvirtLab, folder: string): Promise<Subject> {
  const disks = await createDisks(folder, { vda: SIZES.vda })
  await defineInstance(lab, disks)
  const { vda: path = '' } = disks
  await qemuIo(path, 'qcow2', ['write -P 0x11 0 15M'])
  let pattern = 0x20
  return {
    running: false,
    disks,
    async change() {
      pattern += 1
      const last = `write -P ${pattern} 10244k 12k` // inside of what was zeroed
      const commands = [`write -P ${pattern} 6400k 1280k`, 'write -z 10M 2M', 'discard 4M 2M', last]
      await qemuIo(path, 'qcow2', commands)
      return async ({ vda = '' }) =>
        expect(await compareImages(qcow2(vda), qcow2(path))).toMatchObject({ identical: true })
    },
  }
}

const qcow2 = (path: string) => ({ path, format: 'qcow2' }) as const

async function createDisks(folder: string, sizes: Readonly<Record<string, number>>): Promise<Disks> {
  const create = async ([target, size]: [string, number]) => {
    const path = join(folder, `${target}.qcow2`)
    await createQcow2(path, size)
    return [target, path]
  }
  return Object.fromEntries(await Promise.all(Object.entries(sizes).map(create)))
}

function defineInstance(lab: LibvirtLab, disks: Disks): Promise<LabDomain> {
  const files = Object.entries(disks).map(
    ([target, path]) => ({ target, path, format: 'qcow2', discard: 'unmap' }) as const,
  )
  return lab.createDomain({ name: INSTANCE, disks: files })
}

/** What an example does for an instance, and what comes after it, on each of some storages. */
export function describeRemoteJob(
  types: readonly SiteType[],
  create: (lab: LibvirtLab, folder: string) => Promise<Subject>,
): void {
  let lab: LibvirtLab
  let folder: string
  let subject: Subject

  // One instance keeps a chain on each of the storages.
  beforeAll(async () => {
    folder = await mkdtemp(join(tmpdir(), 'varve-remote-'))
    lab = await startLibvirt()
    subject = await create(lab, folder)
  })
  afterAll(async () => {
    await lab?.stop()
    await rm(folder, { recursive: true })
  })

  describe.each(types)('on %s', type => {
    let site: RemoteSite
    let home: string

    beforeAll(async () => {
      home = join(folder, type)
      await mkdir(home)
      site = await SITES[type](home)
    })
    afterAll(async () => {
      await site?.driver[Symbol.asyncDispose]()
      await site?.[Symbol.asyncDispose]()
    })

    /**
     * The local files that some work leaves data in, be it for a moment, but for the disks, which get bitmaps, and a storage that
     * is a folder.
     */
    async function staged<T>(work: () => Promise<T>) {
      const { value, temporary, written } = await watchStaging(work)
      const files = temporary.filter(name => !name.startsWith('varve-nbd-')) // sockets of qemu-nbd
      const isMeant = (path: string) =>
        Object.values(subject.disks).includes(path) || path.startsWith(join(home, 'remote'))
      return { value, paths: [...files, ...written.filter(path => !isMeant(path))] }
    }

    test("the example's backup and an increment restore what the instance had, also without Varve", async () => {
      const script = fileURLToPath(new URL(`../store-remotely/${type}.ts`, import.meta.url))
      const stateDir = join(home, 'state')
      const args = [script, INSTANCE, ...site.args, stateDir, lab.uri]
      const example = await staged(async () =>
        execa(process.execPath, args, { ...(site.env && { env: site.env }) }),
      )
      expect(example.paths, 'what a full backup has written to local files').toEqual([])
      const { stdout } = example.value
      const [found, ...others] = (await new ChainManager({ storage: site.driver }).list()).backups
      expect(others).toEqual([])
      const full = found?.manifest ?? expect.fail('the storage has no backup')
      expect(full).toMatchObject({ kind: 'full', running: subject.running })
      expect(stdout).toContain(`${full.id} is `)

      const pipelines = { host: new LibvirtHost({ uri: lab.uri }), storage: site.driver, stateDir }
      const backups = new BackupPipeline(pipelines)
      const expectRestored = await subject.change()
      /** What the storage ran, by the events. */
      const ran: (string | undefined)[] = []
      const onEvent = (event: VarveEvent) =>
        void (event.type === 'command' && event.command === type && ran.push(event.args[0]))
      const increment = await backups.run({ instance: INSTANCE }, { onEvent })
      if (type === 'rclone') expect(ran).toEqual(expect.arrayContaining(['lsjson', 'rcat', 'moveto']))
      expect(increment).toMatchObject({ kind: 'incremental', parent: full.id })
      expect(increment.disks[0]?.storedSize).toBeLessThan(5 * MIB)

      const names = Object.keys(subject.disks)
      const disks = Object.fromEntries(names.map(name => [name, join(home, `${name}.qcow2`)]))
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
        // QEMU reads what an increment lacks from its parent
        expect(await compareImages(qcow2(path), qcow2(stored))).toMatchObject({ identical: true })
      }
      await expectRestored(disks)
    })
  })
}
