import { randomBytes } from 'node:crypto'
import { mkdir, readdir, readFile, rm, symlink, writeFile } from 'node:fs/promises'
import { basename, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { createQcow2, createRaw, type LabDomain, qemuIo, sha256File } from '@varve/testkit/lab'
import { execa } from 'execa'
import { beforeEach, expect, onTestFinished, test } from 'vitest'
import { BackupPipeline } from '../src/backup-pipeline.ts'
import { diskDefinition } from '../src/domain-xml.ts'
import type { VarveEvent } from '../src/events.ts'
import { LibvirtHost } from '../src/libvirt-host.ts'
import type { BackupManifest } from '../src/manifest.ts'
import { recover } from '../src/recover.ts'
import { RestorePipeline } from '../src/restore-pipeline.ts'
import { MiB, useVmSite } from './vm-site.ts'

const site = useVmSite()
const SIZE = 8 * MiB
/** A qcow2 image needs room for its tables on a device. */
const DEVICE_SIZE = 12 * MiB

/** Where the test has its devices: `dm-0` and the like, as the kernel numbers them, and `vg/web`, which stays. */
let dev: string
/** The kernel's numbers of the volumes' devices. */
const numbers = new Map<string, string>()
const overlayFolder = () => join(site.folder, 'overlays')
const host = () => new LibvirtHost({ uri: site.lab.uri, overlayFolder: overlayFolder() })
const pipelines = () => ({ host: host(), storage: site.storage, stateDir: site.stateDir })
const volume = (name: string) => join(dev, 'vg', name)

beforeEach(async () => {
  dev = `/dev/varve-test-${randomBytes(4).toString('hex')}`
  onTestFinished(() => rm(dev, { recursive: true, force: true }))
  await mkdir(join(dev, 'vg'), { recursive: true })
  await mkdir(overlayFolder())
})

/** The number of the device that a file is made, as long as the test lasts. */
async function attach(file: string): Promise<string> {
  const { stdout: loop } = await execa('losetup', ['--find', '--show', file])
  onTestFinished(async () => void (await execa('losetup', ['--detach', loop])))
  return loop.slice('/dev/loop'.length)
}

/** Makes a volume in a file beside the instance, the node of its device, and a link to that. */
async function createVolume(name: string, device: string): Promise<void> {
  await createRaw(site.image(name), DEVICE_SIZE)
  const number = await attach(site.image(name))
  numbers.set(name, number)
  await makeNode(device, number)
  await symlink(`../${device}`, volume(name))
}

async function makeNode(device: string, number: string | undefined): Promise<void> {
  await rm(join(dev, device), { force: true })
  await execa('mknod', [join(dev, device), 'b', '7', number ?? expect.fail('no such volume')])
}

/** An instance on two block devices: a qcow2 image, and a raw one. */
async function createVm(): Promise<LabDomain> {
  await createVolume('web', 'dm-0')
  await createVolume('data', 'dm-1')
  await createQcow2(volume('web'), SIZE)
  const disks = [
    { target: 'vda', path: volume('web'), format: 'qcow2', blockDevice: true, discard: 'unmap' },
    { target: 'vdb', path: volume('data'), format: 'raw', blockDevice: true },
  ] as const
  return site.createVm([], { disks })
}

const backup = (instance: string): Promise<BackupManifest> =>
  new BackupPipeline(pipelines()).run({ instance })
const definition = (vm: LabDomain) => site.lab.virsh(['dumpxml', '--inactive', vm.name])

/** Has something happen right before an object of this name is stored, in the middle of the next backup. */
function before(name: string, happens: () => Promise<unknown>): void {
  site.storage.beforePut = async key => {
    if (!key.endsWith(`/${name}`)) return
    site.storage.beforePut = undefined
    await happens()
  }
}

/** Kills a backup in the middle of its upload, and resolves with its id. */
async function dieMidBackup(instance: string): Promise<string> {
  const { storagePath, stateDir } = site
  const told = { uri: site.lab.uri, overlayFolder: overlayFolder(), storagePath, stateDir, instance }
  const program = fileURLToPath(new URL('./die-mid-backup.ts', import.meta.url))
  const { signal } = await execa(process.execPath, ['--import', 'tsx', program], {
    env: { VARVE_TEST: JSON.stringify(told) },
    reject: false,
  })
  expect(signal).toBe('SIGKILL')
  const [journal = ''] = await readdir(join(stateDir, 'runs'))
  return basename(journal, '.jsonl')
}

const FIRST = 'write -P 0x11 0 4M'
const MEANWHILE = 'write -P 0x22 2M 4M'
const HELD = ['read -P 0x11 0 4M', 'read -P 0 4M 4M']
const NOW = ['read -P 0x11 0 2M', 'read -P 0x22 2M 4M', 'read -P 0 6M 2M']

async function write(vm: LabDomain, command: string): Promise<void> {
  for (const disk of ['vda', 'vdb']) await vm.io(disk, command)
}

/** Reads the disks of an instance that is off. */
async function expectHolds(...reads: string[]): Promise<void> {
  await qemuIo(volume('web'), 'qcow2', reads)
  await qemuIo(volume('data'), 'raw', reads)
}

async function expectStored(manifest: BackupManifest, ...reads: string[]): Promise<void> {
  for (const disk of ['vda', 'vdb']) await site.expectStored(manifest, reads, disk)
}

test('an instance on block devices is backed up while it runs, and restored in place', async () => {
  const vm = await createVm()
  const defined = await definition(vm)
  await vm.start()
  await write(vm, FIRST)
  before('vda.qcow2', () => write(vm, MEANWHILE))
  const full = await backup(vm.name)
  await expectStored(full, ...HELD)
  expect(await definition(vm)).toBe(defined)

  const next = await backup(vm.name)
  expect(next).toMatchObject({
    parent: full.id,
    disks: [{ kind: 'incremental' }, { kind: 'full', fallback: 'format-raw' }],
  })
  await expectStored(next, ...NOW)
  expect(await readdir(overlayFolder())).toEqual([])

  const to = { instance: vm.name }
  await new RestorePipeline(pipelines()).run({ backup: full.id, to, inPlace: true, powerOffTimeoutMs: 0 })
  expect(await vm.state()).toBe('running')
  expect(await definition(vm)).toBe(defined)
  await vm.destroy()
  await expectHolds('read -P 0x11 0 4M', 'read -P 0 4M 4M')
})

test('an instance that goes off in the middle of a backup is defined as before, and starts on what it wrote', async () => {
  const vm = await createVm()
  const defined = await definition(vm)
  await vm.start()
  await write(vm, FIRST)
  before('vda.qcow2', async () => {
    await write(vm, MEANWHILE)
    await vm.destroy()
  })
  const full = await backup(vm.name)
  await expectStored(full, ...HELD)
  expect(await definition(vm)).toBe(defined)
  await expectHolds(...NOW)
  await vm.start()
})

/** A reboot at which the kernel gives the volume `web` another number, and another volume its old one. */
async function rebootRenumbered(): Promise<void> {
  await site.lab.powerCycle()
  await makeNode('dm-2', numbers.get('web'))
  await makeNode('dm-0', numbers.get('other'))
  await rm(volume('web'))
  await symlink('../dm-2', volume('web'))
}

/** Takes out of the journals what older versions did not record. */
async function makeJournalsOld(): Promise<void> {
  const runs = join(site.stateDir, 'runs')
  for (const name of await readdir(runs)) {
    const journal = await readFile(join(runs, name), 'utf8')
    const old = journal.replace(/,"definition":"[^\n]*?","device":"[^"]*"/g, '')
    expect(old).not.toMatch(/"definition"|"device"/)
    expect(old.length).toBeLessThan(journal.length)
    await writeFile(join(runs, name), old)
  }
}

test.each([
  { what: 'it runs on', happens: async () => undefined },
  { what: 'it is destroyed', happens: (vm: LabDomain) => vm.destroy() },
  { what: 'the host reboots', happens: () => site.lab.powerCycle() },
  { what: 'a device is renumbered', happens: rebootRenumbered },
  {
    what: 'renumbered, and started again',
    happens: async (vm: LabDomain) => {
      await rebootRenumbered()
      await vm.start()
    },
  },
  {
    what: 'renumbered, with an older journal',
    happens: async () => {
      await rebootRenumbered()
      await makeJournalsOld()
    },
  },
])(
  'an instance on block devices is as before once a killed backup is recovered: $what',
  async ({ happens }) => {
    const vm = await createVm()
    await createVolume('other', 'dm-3')
    const defined = await definition(vm)
    await vm.start()
    await write(vm, FIRST)
    await dieMidBackup(vm.name)
    // Such as a snapshot that LVM made of the volume, with the bitmaps that the backup began.
    await execa('dd', [`if=${volume('web')}`, `of=${volume('other')}`, 'bs=1M', 'conv=fsync'])
    const other = await sha256File(site.image('other'))
    await write(vm, MEANWHILE)
    await happens(vm)
    const events: VarveEvent[] = []
    const onEvent = (event: VarveEvent) => void events.push(event)
    const report = await recover({ stateDir: site.stateDir, storages: [site.storage] }, { onEvent })
    expect(report).toMatchObject({ ok: true, runs: [{ outcome: 'undone' }] })
    expect(events.filter(({ type }) => type === 'warning')).toEqual([])
    expect(await readdir(overlayFolder())).toEqual([])
    expect(await definition(vm)).toBe(defined)
    if ((await vm.state()) === 'running') await vm.destroy()
    await expectHolds(...NOW)
    expect(await host().instance(vm.name)).toMatchObject({ disks: [{ bitmaps: [] }, {}] })
    expect(await sha256File(site.image('other'))).toBe(other)
    await vm.start()
  },
)

test('an overlay that no run knows of is merged by the name of its device, which has another number by then', async () => {
  const vm = await createVm()
  await createVolume('other', 'dm-3')
  const defined = await definition(vm)
  await vm.start()
  const id = await dieMidBackup(vm.name)
  await write(vm, MEANWHILE)
  await rm(join(site.stateDir, 'runs', `${id}.jsonl`))
  await rebootRenumbered()
  await vm.start()
  await expect(backup(vm.name)).rejects.toMatchObject({ code: 'OVERLAY_LEFT_OVER' })
  const report = await recover({ stateDir: site.stateDir, storages: [site.storage] })
  expect(report).toMatchObject({ ok: true, runs: [{ id, outcome: 'undone' }] })
  expect(await definition(vm)).toBe(defined)
  await vm.destroy()
  await expectHolds('read -P 0 0 2M', 'read -P 0x22 2M 4M', 'read -P 0 6M 2M')
})

test('an overlay is never merged into another device that has the name of its base by now', async () => {
  const vm = await createVm()
  await vm.start()
  const id = await dieMidBackup(vm.name)
  await write(vm, MEANWHILE)
  await vm.destroy()
  const path = join(site.stateDir, 'runs', `${id}.jsonl`)
  const journal = await readFile(path, 'utf8')
  // The kernel knows a volume of LVM by its uuid, and nothing of a loop device that stays.
  await writeFile(path, journal.replaceAll('"device":"device "', '"device":"device LVM-other"'))
  const images = () => Promise.all(['web', 'data'].map(name => sha256File(site.image(name))))
  const untouched = await images()
  const settled = () => recover({ stateDir: site.stateDir, storages: [site.storage] })
  expect(await settled()).toMatchObject({
    runs: [
      {
        outcome: 'unresolved',
        error: {
          code: 'BLOCK_COMMIT_FAILED',
          message: expect.stringContaining(`${volume('web')} is another device`),
        },
      },
    ],
  })
  expect(await images()).toEqual(untouched)
  expect(await readdir(overlayFolder())).toHaveLength(2)
  await writeFile(path, journal)
  expect(await settled()).toMatchObject({ ok: true })
  await expectHolds('read -P 0 0 2M', 'read -P 0x22 2M 4M', 'read -P 0 6M 2M')
})

test('a disk is not frozen that would be put back to what its definition named for a moment', async () => {
  const vm = await createVm()
  const defined = await definition(vm)
  await vm.start()
  const planned = diskDefinition(defined.replace(volume('web'), join(dev, 'dm-1')), 'vda')
  const overlay = {
    disk: 'vda',
    base: join(dev, 'dm-0'),
    baseFormat: 'qcow2',
    overlay: join(overlayFolder(), 'overlay'),
    definition: planned ?? expect.fail('no vda'),
  } as const
  await expect(host().snapshot(vm.name, [overlay])).rejects.toMatchObject({
    code: 'SNAPSHOT_FAILED',
    context: { disk: 'vda', runsOn: volume('web'), definedAs: join(dev, 'dm-1') },
  })
  expect(await readdir(overlayFolder())).toEqual([])
  expect(await definition(vm)).toBe(defined)
})

/** Replaces the disks of an instance that is off. */
async function defineDisks(vm: LabDomain, ...disks: string[]): Promise<string> {
  const xml = await definition(vm)
  const element = (disk: string, index: number) =>
    disk.replace('</disk>', `<target dev='vd${'ab'[index]}' bus='virtio'/></disk>`)
  await host().define(xml.replace(/<disk [\s\S]*<\/disk>/, disks.map(element).join('')))
  return definition(vm)
}

test('a volume of a pool and a disk with its backing file are defined as before, whether their instance goes off or runs on', async () => {
  const vm = await createVm()
  const pool = `pool-${vm.name}`
  await createQcow2(site.image('volume'), SIZE)
  await site.lab.virsh(['pool-create-as', pool, 'dir', '--target', site.folder])
  onTestFinished(async () => void (await site.lab.virsh(['pool-destroy', pool])))
  await createQcow2(site.image('template'), SIZE)
  const over = ['-f', 'qcow2', '-F', 'qcow2', '-b', site.image('template')]
  await execa('qemu-img', ['create', '-q', ...over, site.image('over')])
  const defined = await defineDisks(
    vm,
    `<disk type='volume' device='disk'><driver name='qemu' type='qcow2' cache='none'><metadata_cache><max_size unit='bytes'>1048576</max_size></metadata_cache></driver><source pool='${pool}' volume='volume'/></disk>`,
    `<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='${site.image('over')}'/><backingStore type='file'><format type='qcow2'/><source file='${site.image('template')}'/><backingStore/></backingStore></disk>`,
  )
  await vm.start()
  await backup(vm.name)
  expect(await definition(vm)).toBe(defined)
  before('vda.qcow2', async () => {
    await write(vm, MEANWHILE)
    await vm.destroy()
  })
  await backup(vm.name)
  expect(await definition(vm)).toBe(defined)
  await vm.start()
  before('vda.qcow2', async () => {
    await vm.destroy()
    await vm.start()
  })
  await backup(vm.name)
  expect(await definition(vm)).toBe(defined)
  await vm.destroy()
  for (const name of ['volume', 'over'])
    await qemuIo(site.image(name), 'qcow2', ['read -P 0 0 2M', 'read -P 0x22 2M 4M'])
})

test.each(['a file', 'a block device'])(
  'a definition from when the disk was %s is put back with the disk where it is now',
  async was => {
    const vm = await createVm()
    await createQcow2(site.image('file'), SIZE)
    const onDevice = `<disk type='block' device='disk'><driver name='qemu' type='qcow2'/><source dev='${volume('web')}'/></disk>`
    const onFile = `<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='${site.image('file')}'/></disk>`
    const [then, now] = was === 'a file' ? [onFile, onDevice] : [onDevice, onFile]
    await defineDisks(vm, then)
    const full = await backup(vm.name)
    const defined = await defineDisks(vm, now)
    const to = { instance: vm.name }
    const definitionOfBackup = { definition: 'restore', inPlace: true } as const
    await new RestorePipeline(pipelines()).run({ backup: full.id, to, ...definitionOfBackup })
    expect(await definition(vm)).toBe(defined)
    await vm.start()
  },
)
