import { randomBytes } from 'node:crypto'
import { mkdir, readdir, readFile, rm, symlink, writeFile } from 'node:fs/promises'
import { basename, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { createQcow2, createRaw, type LabDomain, qemuIo, sha256File } from '@varve/testkit/lab'
import { execa } from 'execa'
import { beforeEach, expect, onTestFinished } from 'vitest'
import type { VarveEvent } from '../src/events.ts'
import { LibvirtHost } from '../src/libvirt-host.ts'
import { recover } from '../src/recover.ts'
import { MiB, useVmSite } from './vm-site.ts'

export const SIZE: number = 8 * MiB
/** A qcow2 image needs room for its tables on a device. */
const DEVICE_SIZE = 12 * MiB

export const FIRST = 'write -P 0x11 0 4M'
export const MEANWHILE = 'write -P 0x22 2M 4M'
/** What the disks hold after the first write, and after both. */
export const HELD = ['read -P 0x11 0 4M', 'read -P 0 4M 4M']
export const NOW = ['read -P 0x11 0 2M', 'read -P 0x22 2M 4M', 'read -P 0 6M 2M']

/** A site whose instance is on block devices. To be called once in a test file. */
export function useBlockDevices() {
  const site = useVmSite()
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

  const definition = (vm: LabDomain) => site.lab.virsh(['dumpxml', '--inactive', vm.name])

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

  async function write(vm: LabDomain, command: string): Promise<void> {
    for (const disk of ['vda', 'vdb']) await vm.io(disk, command)
  }

  /** Reads the disks of an instance that is off. */
  async function expectHolds(...reads: string[]): Promise<void> {
    await qemuIo(volume('web'), 'qcow2', reads)
    await qemuIo(volume('data'), 'raw', reads)
  }

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

  /** An instance is as before once a backup is recovered that was killed in the middle, whatever happened to it then. */
  async function expectRecovered(happens: (vm: LabDomain) => Promise<unknown>): Promise<void> {
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
  }

  return {
    ...{ site, host, pipelines, overlayFolder, volume, definition, createVolume, createVm, dieMidBackup },
    ...{ write, expectHolds, rebootRenumbered, makeJournalsOld, expectRecovered },
    /** The path of a device by the name that the kernel gives it. */
    device: (name: string) => join(dev, name),
  }
}
