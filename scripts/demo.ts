/** The job of `./scripts/demo`; see there. */
import { mkdir, mkdtemp, readdir, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import {
  type BackupManifest,
  BackupPipeline,
  type BackupRequest,
  ChainManager,
  type Host,
  ImageHost,
  LibvirtHost,
  RestorePipeline,
  type RestoreRequest,
} from '@varve/core'
import { LocalDriver } from '@varve/driver-local'
import {
  checkQcow2,
  compareImages,
  createQcow2,
  type LabDomain,
  type LibvirtLab,
  libvirtAvailable,
  qemuIo,
  sha256Content,
  startLibvirt,
} from '@varve/testkit/lab'
import { execa } from 'execa'
import { DemoView } from './demo-view.ts'

const MiB = 1024 * 1024
const view = new DemoView()
const aborter = new AbortController()
for (const signal of ['SIGINT', 'SIGTERM'] as const) {
  process.once(signal, () => {
    view.say('Cleaning up …')
    aborter.abort(new Error(`${signal} was received`))
  })
}

/** What the demo does its job with: a virtual machine, or images where none can run. */
interface Stage {
  readonly host: Host
  readonly instance: string
  /** Writes, zeroes and trims. `round` 0 is the first content. */
  change(round: number): Promise<void>
  /** Whether something writes to vdb while `work` runs. */
  whileWriting<T>(work: () => Promise<T>): Promise<T>
  /** SHA-256 of each disk as the instance sees it, by name. */
  sums(): Promise<Record<string, string>>
  /** After a restore over the instance: makes it readable by `sums`. */
  afterRestore(): Promise<void>
}

const folder = await mkdtemp(join(tmpdir(), 'varve-demo-'))
let lab: LibvirtLab | undefined
try {
  const available = await libvirtAvailable()
  if (available.available) {
    view.step('Starting a libvirt of its own and booting a small Linux guest (software emulation)')
    lab = await startLibvirt()
    await demo(await vmStage(lab))
  } else {
    view.step(`No virtual machine can run here (${available.reason}): the same job on disk images`)
    await demo(await imageStage())
  }
} catch (error) {
  process.exitCode = 1
  view.fail(error)
} finally {
  await lab?.stop()
  await rm(folder, { recursive: true, force: true })
  view.say('Everything that the demo made is removed.')
}

async function demo(stage: Stage): Promise<void> {
  const { host, instance } = stage
  const storagePath = join(folder, 'backups')
  await mkdir(storagePath)
  await using storage = new LocalDriver({ path: storagePath })
  const stateDir = join(folder, 'state')
  const run = { signal: aborter.signal, onEvent: view.onEvent }
  const chains = new ChainManager({ storage })

  const backup = async (request: Partial<BackupRequest> = {}): Promise<BackupManifest> => {
    const start = performance.now()
    const manifest = await new BackupPipeline({ host, storage, stateDir }).run({ instance, ...request }, run)
    view.row(`${manifest.kind} backup`, manifest.disks, (performance.now() - start) / 1000)
    return manifest
  }
  const restore = async (what: string, request: RestoreRequest) => {
    const start = performance.now()
    const { disks } = await new RestorePipeline({ host, storage, stateDir }).run(request, run)
    view.row(
      what,
      disks.map(disk => ({ name: disk.name, virtualSize: disk.virtualSize, storedSize: disk.bytesWritten })),
      (performance.now() - start) / 1000,
    )
  }

  view.step('Writing data in the guest')
  await stage.change(0)

  view.step('Full backup, while the guest goes on writing')
  await stage.whileWriting(() => backup({ type: 'full' }))

  view.step('Overwriting, zeroing and trimming in the guest; an incremental backup while it writes')
  await stage.change(1)
  const first = await stage.whileWriting(() => backup())
  view.prove('the second backup holds only what changed', first.kind === 'incremental')

  view.step('Changing more; the second incremental backup')
  await stage.change(2)
  const wanted = await stage.sums()
  const last = await backup()

  view.step('Verifying the chain: every block of every image against its digest')
  const verified = await chains.verify(last.id, { deep: true, signal: aborter.signal })
  view.prove(`a deep verification of ${last.id} finds nothing wrong`, verified.ok)

  view.step('Restoring the last backup to new images')
  const disks = Object.fromEntries(
    last.disks.map(({ name }) => [name, join(folder, `${name}-restored.qcow2`)]),
  )
  await restore('restore to new images', { backup: last.id, to: { disks } })
  for (const [name, path] of Object.entries(disks)) {
    await checkQcow2(path)
    view.prove(
      `${name}: the restored image has the checksum that the guest had`,
      (await sha256Content(path, 'qcow2')) === wanted[name],
    )
    // Without Varve: plain qemu-img follows the chain as it is stored.
    const plain = join(folder, `${name}-plain.qcow2`)
    await execa('qemu-img', [
      'convert',
      '-O',
      'qcow2',
      join(storagePath, instance, last.chain, last.id, `${name}.qcow2`),
      plain,
    ])
    const { identical } = await compareImages({ path, format: 'qcow2' }, { path: plain, format: 'qcow2' })
    view.prove(`${name}: qemu-img convert of the stored chain gives the same (qemu-img compare)`, identical)
  }

  view.step('Damaging the instance, then restoring the last backup over it')
  await stage.change(3)
  const damaged = await stage.sums()
  view.prove(
    'the instance is not what it was',
    Object.entries(damaged).some(([name, sum]) => sum !== wanted[name]),
  )
  await restore('restore over the instance', { backup: last.id, to: { instance }, powerOffTimeoutMs: 30_000 })
  await stage.afterRestore()
  const restored = await stage.sums()
  for (const [name, sum] of Object.entries(wanted)) {
    view.prove(`${name}: the instance has its former content again`, restored[name] === sum)
  }

  view.step('One more backup: the chain goes on after the restore, without a new full')
  await stage.change(4)
  const next = await backup()
  view.prove(`it is an increment on ${last.id}`, next.kind === 'incremental' && next.parent === last.id)
  const left = (await readdir(folder)).filter(name => name.includes('.varve-'))
  view.prove('no overlay and no temporary file is left beside the disks', left.length === 0)
  view.close()
}

async function vmStage(lab: LibvirtLab): Promise<Stage> {
  const sizes: Record<string, number> = { vda: 256 * MiB, vdb: 64 * MiB }
  for (const [name, size] of Object.entries(sizes)) await createQcow2(join(folder, name), size)
  const vm: LabDomain = await lab.createDomain({
    name: 'web-1',
    disks: Object.keys(sizes).map(target => ({
      target,
      path: join(folder, target),
      format: 'qcow2',
      discard: 'unmap',
    })),
  })
  await vm.boot()
  const sum = async (name: string) =>
    (await vm.run(`sha256sum /dev/${name}`, { timeoutMs: 120_000 })).stdout.slice(0, 64)
  const random = (count: number, seek: number) =>
    `dd if=/dev/urandom of=/dev/vda bs=1M count=${count} seek=${seek} conv=fsync`
  const changes = [
    [random(96, 0), 'dd if=/dev/urandom of=/dev/vdb bs=1M count=16 conv=fsync'],
    [
      random(4, 10),
      'dd if=/dev/zero of=/dev/vda bs=1M count=8 seek=30 conv=fsync',
      'blkdiscard -o 62914560 -l 8388608 /dev/vda',
    ],
    [random(2, 120), 'dd if=/dev/urandom of=/dev/vdb bs=64k count=5 seek=40 conv=fsync'],
    [random(40, 20)],
    [random(1, 5)],
  ]
  return {
    host: new LibvirtHost({ uri: lab.uri }),
    instance: vm.name,
    async change(round) {
      for (const command of changes[round] ?? []) await vm.run(command, { timeoutMs: 120_000 })
    },
    async whileWriting(work) {
      const writer = vm.startWriter({ device: '/dev/vdb', blocks: 1000 })
      await writer.waitForWrites(3)
      try {
        return await work()
      } finally {
        const writes = await writer.stop()
        view.say(`The guest made ${writes.length} durable writes meanwhile.`)
      }
    },
    async sums() {
      await vm.run('sync; echo 3 > /proc/sys/vm/drop_caches')
      return { vda: await sum('vda'), vdb: await sum('vdb') }
    },
    afterRestore: () => vm.waitForBoot(),
  }
}

async function imageStage(): Promise<Stage> {
  const path = join(folder, 'vda')
  await createQcow2(path, 256 * MiB)
  const changes = [
    ['write -P 0x11 0 96M'],
    ['write -P 0x22 10M 4M', 'write -z 30M 8M', 'discard 60M 8M'],
    ['write -P 0x33 120M 2M'],
    ['write -P 0x44 20M 40M'],
    ['write -P 0x55 5M 1M'],
  ]
  return {
    host: new ImageHost({ instance: 'web-1', disks: { vda: path } }),
    instance: 'web-1',
    async change(round) {
      await qemuIo(path, 'qcow2', changes[round] ?? [])
    },
    whileWriting: work => work(),
    sums: async () => ({ vda: await sha256Content(path, 'qcow2') }),
    afterRestore: () => Promise.resolve(),
  }
}
