import { readdir, readFile, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { createQcow2, type LabDomain, qemuIo, sha256File } from '@varve/testkit/lab'
import { thoroughTest } from '@varve/testkit/thorough'
import { execa } from 'execa'
import { expect, onTestFinished, test } from 'vitest'
import { BackupPipeline } from '../src/backup-pipeline.ts'
import { diskDefinition } from '../src/domain-xml.ts'
import type { BackupManifest } from '../src/manifest.ts'
import { recover } from '../src/recover.ts'
import { RestorePipeline } from '../src/restore-pipeline.ts'
import { FIRST, HELD, MEANWHILE, NOW, SIZE, useBlockDevices } from './block-devices.ts'

const devices = useBlockDevices()
const { site, host, pipelines, overlayFolder, volume, device, definition, createVolume, createVm } = devices
const { dieMidBackup, write, expectHolds, rebootRenumbered, expectRecovered } = devices

const backup = (instance: string): Promise<BackupManifest> =>
  new BackupPipeline(pipelines()).run({ instance })

/** Has something happen right before an object of this name is stored, in the middle of the next backup. */
function before(name: string, happens: () => Promise<unknown>): void {
  site.storage.beforePut = async key => {
    if (!key.endsWith(`/${name}`)) return
    site.storage.beforePut = undefined
    await happens()
  }
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

test('an instance on block devices is as before once a killed backup is recovered: a device is renumbered', () =>
  expectRecovered(rebootRenumbered))

thoroughTest(
  'an overlay that no run knows of is merged by the name of its device, which has another number by then',
  async () => {
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
  },
)

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
  const planned = diskDefinition(defined.replace(volume('web'), device('dm-1')), 'vda')
  const overlay = {
    disk: 'vda',
    base: device('dm-0'),
    baseFormat: 'qcow2',
    overlay: join(overlayFolder(), 'overlay'),
    definition: planned ?? expect.fail('no vda'),
  } as const
  await expect(host().snapshot(vm.name, [overlay])).rejects.toMatchObject({
    code: 'SNAPSHOT_FAILED',
    context: { disk: 'vda', runsOn: volume('web'), definedAs: device('dm-1') },
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

thoroughTest(
  'a volume of a pool and a disk with its backing file are defined as before, whether their instance goes off or runs on',
  async () => {
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
  },
)

for (const was of ['a file', 'a block device']) {
  thoroughTest(
    `a definition from when the disk was ${was} is put back with the disk where it is now`,
    async () => {
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
}
