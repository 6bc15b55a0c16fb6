import { randomUUID } from 'node:crypto'
import { renameSync } from 'node:fs'
import { mkdir, open, readdir, readFile, rename, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { createQcow2, qemuIo, sha256Content, sha256File } from '@varve/testkit/lab'
import { thoroughTest } from '@varve/testkit/thorough'
import { execaSync } from 'execa'
import { expect, test } from 'vitest'
import { BackupPipeline } from '../src/backup-pipeline.ts'
import { blake3Hex } from '../src/digest.ts'
import { VarveError } from '../src/errors.ts'
import type { VarveEvent } from '../src/events.ts'
import { ImageHost } from '../src/image-host.ts'
import { LibvirtHost } from '../src/libvirt-host.ts'
import type { BackupManifest } from '../src/manifest.ts'
import { type RecoverReport, recover } from '../src/recover.ts'
import { RestorePipeline } from '../src/restore-pipeline.ts'
import { abortAtStep } from './abort-at-step.ts'
import { MiB, useVmSite } from './vm-site.ts'

const site = useVmSite()
const { createVm, image, backup, restore, expectCleanHost } = site

const recoverNow = (): Promise<RecoverReport> =>
  recover({ stateDir: site.stateDir, storages: [site.storage] })

const content = (disk: string) => sha256Content(image(disk), 'qcow2')

/** A guest that does not shut itself down is switched off at once. */
const AT_ONCE = { powerOffTimeoutMs: 0 }

function onStage(stage: string, happens: () => void): { onEvent: (event: VarveEvent) => void } {
  return {
    onEvent: event => {
      if (event.type === 'stage' && event.stage === stage) happens()
    },
  }
}

/** Puts another definition into a backup, as one of another host may be. */
async function changeDefinition(manifest: BackupManifest, change: (xml: string) => string): Promise<void> {
  const xml = change(await readFile(site.stored(manifest, 'domain.xml'), 'utf8'))
  await writeFile(site.stored(manifest, 'domain.xml'), xml)
  const path = site.stored(manifest, 'manifest.json')
  const json = JSON.parse(await readFile(path, 'utf8'))
  Object.assign(json.definition, { size: Buffer.byteLength(xml), blake3: blake3Hex(Buffer.from(xml)) })
  await writeFile(path, JSON.stringify(json))
}

const ofAnotherHost = (xml: string) => xml.replace(/machine='[^']*'/, "machine='pc-q35-99.9'")

test('an instance that somebody started again right before the swap keeps its disk, and what it wrote there', async () => {
  const vm = await createVm([{ target: 'vda', size: 16 * MiB }])
  await qemuIo(image('vda'), 'qcow2', ['write -P 0x11 0 8M'])
  const manifest = await backup()
  const wanted = await content('vda')
  await qemuIo(image('vda'), 'qcow2', ['write -P 0x22 4M 8M'])
  await vm.start()
  const startAgain = onStage('swap', () => execaSync('virsh', ['--connect', site.lab.uri, 'start', vm.name]))
  const request = { backup: manifest.id, to: { instance: vm.name }, ...AT_ONCE }
  const unresolved = (message: RegExp) => ({
    code: 'RUN_UNRESOLVED',
    message: expect.stringMatching(message),
    context: { path: image('vda') },
  })
  const recoverIsRefused = async (message: RegExp) =>
    expect(await recoverNow()).toMatchObject({
      ok: false,
      runs: [{ outcome: 'unresolved', error: unresolved(message) }],
    })
  const isInUse = /is in use.*Shut it off.*varve recover/s
  await expect(restore(request, startAgain)).rejects.toMatchObject(unresolved(isInUse))
  await recoverIsRefused(isInUse)
  expect(await vm.state()).toBe('running')
  await vm.io('vda', 'write -P 0x33 0 1M')
  await vm.destroy()
  const theirs = await content('vda')
  await recoverIsRefused(/was written to.*move .*vda away.*varve recover.*keep.*remove .*runs\/.*jsonl/s)
  expect(await content('vda')).toBe(theirs)
  await qemuIo(image('vda'), 'qcow2', ['read -P 0x33 0 1M', 'read -P 0x22 4M 8M'])

  // Another disk at its path, as of an instance that was installed anew.
  await rename(image('vda'), join(site.folder, 'before'))
  await createQcow2(image('vda'), 16 * MiB)
  await recoverIsRefused(/is another file since/)
  await qemuIo(image('vda'), 'qcow2', ['read -P 0 0 16M'])
  await rename(image('vda'), join(site.folder, 'anew'))
  expect(await recoverNow()).toMatchObject({ ok: true, runs: [{ outcome: 'finished' }] })
  expect(await vm.state()).toBe('running')
  await vm.destroy()
  expect(await content('vda')).toBe(wanted)
  await expectCleanHost([`varve-${manifest.id}`])
})

thoroughTest(
  'an instance that somebody started again before the restore was complete has its old disk',
  async () => {
    const vm = await createVm([{ target: 'vda', size: 16 * MiB }])
    const manifest = await backup()
    await qemuIo(image('vda'), 'qcow2', ['write -P 0x22 4M 8M'])
    const theirs = await content('vda')
    await vm.start()
    class Watchdog extends LibvirtHost {
      override async powerOff(...args: Parameters<LibvirtHost['powerOff']>): Promise<void> {
        await super.powerOff(...args)
        await vm.start()
      }
    }
    const { stateDir, storage } = site
    const pipeline = new RestorePipeline({ host: new Watchdog({ uri: site.lab.uri }), storage, stateDir })
    const request = { backup: manifest.id, to: { instance: vm.name }, ...AT_ONCE }
    await expect(pipeline.run(request)).rejects.toMatchObject({
      code: 'DISK_BUSY',
      context: { path: image('vda') },
    })
    expect(await vm.state()).toBe('running')
    await vm.destroy()
    expect(await content('vda')).toBe(theirs)
    await expectCleanHost([`varve-${manifest.id}`])
  },
)

test('an instance that was started or switched off while its new disk was written is so afterwards', async () => {
  const vm = await createVm([{ target: 'vda', size: 16 * MiB }])
  await qemuIo(image('vda'), 'qcow2', ['write -P 0x11 0 8M'])
  const manifest = await backup()
  const wanted = await content('vda')
  const request = { backup: manifest.id, to: { instance: vm.name }, ...AT_ONCE }
  const virsh = (verb: string) => () => execaSync('virsh', ['--connect', site.lab.uri, verb, vm.name])
  expect(await restore(request, onStage('write', virsh('start')))).toMatchObject({ started: true })
  expect(await vm.state()).toBe('running')
  expect(await restore(request, onStage('write', virsh('destroy')))).toMatchObject({ started: false })
  expect(await vm.state()).toBe('shut off')
  expect(await content('vda')).toBe(wanted)
  await expectCleanHost([`varve-${manifest.id}`])
})

test('a running instance is as it was where a restore in place fails before its first write, and is not switched off for one that cannot fit', async () => {
  const vm = await createVm([{ target: 'vda', size: 16 * MiB }])
  await vm.start()
  await vm.io('vda', 'write -P 0x11 0 8M')
  const manifest = await backup()
  await vm.io('vda', 'write -P 0x22 4M 8M')
  const theirs = ['read -P 0x11 0 4M', 'read -P 0x22 4M 8M', 'read -P 0 12M 4M']

  const larger = join(site.folder, 'larger')
  await createQcow2(larger, 32 * MiB)
  const images = new ImageHost({ instance: 'other', disks: { vda: larger } })
  const { storage, stateDir } = site
  const { id } = await new BackupPipeline({ host: images, storage, stateDir }).run({ instance: 'other' })
  const inPlace = { to: { instance: vm.name }, inPlace: true, ...AT_ONCE }
  const pid = await vm.qemuPid()
  await expect(restore({ backup: id, ...inPlace })).rejects.toMatchObject({
    code: 'TARGET_TOO_SMALL',
    context: { path: image('vda'), needed: 32 * MiB, available: 16 * MiB },
  })
  expect(await vm.qemuPid()).toBe(pid)

  // The storage goes away once the instance is off.
  const away = `${site.storagePath}.away`
  const goesAway = onStage('write', () => renameSync(site.storagePath, away))
  const failed = await restore({ backup: manifest.id, ...inPlace }, goesAway).catch((error: unknown) => error)
  expect(failed).toBeInstanceOf(VarveError)
  expect(failed).not.toMatchObject({ context: { incomplete: ['vda'] } })
  renameSync(away, site.storagePath)
  expect(await vm.state()).toBe('running')
  expect(await vm.qemuPid()).not.toBe(pid)
  await site.expectHolds('vda', ...theirs)
  await expectCleanHost([`varve-${manifest.id}`])

  // Cut short in the middle, it is not started; the next restore may not start it either while a disk is half written.
  const incomplete = { code: 'ABORTED', context: { incomplete: ['vda'] } }
  const cut = restore({ backup: manifest.id, ...inPlace }, { signal: abortAtStep('write-in-place') })
  await expect(cut).rejects.toMatchObject(incomplete)
  expect(await vm.state()).toBe('shut off')
  await expect(backup()).rejects.toMatchObject({ code: 'DISK_INCOMPLETE' })
  // Nor on another host, which has not the record of the restore, be the instance off there or running.
  const host = new LibvirtHost({ uri: site.lab.uri })
  const other = new BackupPipeline({ host, storage, stateDir: join(site.folder, 'state of another host') })
  const marked = {
    code: 'DISK_INCOMPLETE',
    message: expect.stringMatching(/another host.*qemu-img bitmap --remove/),
  }
  await expect(other.run({ instance: vm.name })).rejects.toMatchObject(marked)
  await vm.start()
  await expect(other.run({ instance: vm.name })).rejects.toMatchObject(marked)
  await vm.destroy()
  // It ran before, so that it does again once the restore is made good, be it at the second try.
  const again = restore({ backup: manifest.id, ...inPlace }, { signal: abortAtStep('write-in-place') })
  await expect(again).rejects.toMatchObject(incomplete)
  const whole = await restore({ backup: manifest.id, to: { instance: vm.name } })
  expect([whole.started, await vm.state()]).toEqual([true, 'running'])
  await site.expectHolds('vda', 'read -P 0x11 0 8M', 'read -P 0 8M 8M')
  expect(await recoverNow()).toEqual({ ok: true, runs: [] })
  await expectCleanHost([`varve-${manifest.id}`])
})

test('an instance that does not start is told of beside what became of the restore', async () => {
  const vm = await createVm([{ target: 'vda', size: 16 * MiB }])
  await qemuIo(image('vda'), 'qcow2', ['write -P 0x11 0 8M'])
  const manifest = await backup()
  const wanted = await content('vda')
  await qemuIo(image('vda'), 'qcow2', ['write -P 0x22 4M 8M'])
  const theirs = await content('vda')
  const network = `idle-${vm.name}`
  const networkXml = join(site.folder, 'network.xml')
  await writeFile(networkXml, `<network><name>${network}</name></network>`)
  await site.lab.virsh(['net-define', networkXml])
  const startable = await site.lab.virsh(['dumpxml', '--inactive', vm.name])
  /** It runs, and will not again: nobody has started the network that it is on by now. */
  const strand = async () => {
    await site.host.define(startable)
    await vm.start()
    const nic = `<interface type='network'><source network='${network}'/></interface>`
    await site.host.define(startable.replace('</devices>', `${nic}</devices>`))
  }
  const request = { backup: manifest.id, to: { instance: vm.name }, ...AT_ONCE }
  const notStarted = `${vm.name} was not started: .*network '${network}' is not active.*virsh start`
  try {
    await strand()
    await expect(restore(request, { signal: abortAtStep('powered-off') })).rejects.toMatchObject({
      code: 'ABORTED',
      message: expect.stringMatching(notStarted),
      context: expect.not.objectContaining({ restored: ['vda'] }),
    })
    expect(await vm.state()).toBe('shut off')
    expect(await content('vda')).toBe(theirs)
    await expectCleanHost([`varve-${manifest.id}`])

    await strand()
    await expect(restore(request)).rejects.toMatchObject({
      code: 'COMMAND_FAILED',
      message: expect.stringMatching(`^The disk vda is restored, and whole.*${notStarted}`),
      context: { restored: ['vda'], instance: vm.name },
      retryable: false,
    })
    expect(await vm.state()).toBe('shut off')
    expect(await content('vda')).toBe(wanted)
    await expectCleanHost([`varve-${manifest.id}`])

    // The same where recover carries the restore through: it tells of it once.
    await strand()
    class Silent extends LibvirtHost {
      silent = false
      override async hasSavedMemory(...args: Parameters<LibvirtHost['hasSavedMemory']>): Promise<boolean> {
        if (this.silent) throw new VarveError('COMMAND_TIMEOUT', 'virsh dominfo did not end.')
        return super.hasSavedMemory(...args)
      }
    }
    const host = new Silent({ uri: site.lab.uri })
    const goesSilent = onStage('swap', () => {
      host.silent = true
    })
    const { stateDir, storage } = site
    const cut = new RestorePipeline({ host, storage, stateDir }).run(request, goesSilent)
    await expect(cut).rejects.toMatchObject({ code: 'COMMAND_TIMEOUT' })
    expect(await recoverNow()).toMatchObject({
      ok: false,
      runs: [{ outcome: 'finished', error: { message: expect.stringMatching(notStarted) } }],
    })
    expect(await content('vda')).toBe(wanted)
    expect(await recoverNow()).toEqual({ ok: true, runs: [] })
    await expectCleanHost([`varve-${manifest.id}`])
  } finally {
    await site.host.define(startable)
    await site.lab.virsh(['net-undefine', network])
  }
})

const REFUSED = {
  code: 'COMMAND_FAILED',
  message: expect.stringMatching(/refused.*nothing was changed.*pc-q35-99.9.*disks alone/s),
}

test('a definition that libvirt refuses leaves the instance running as it was', async () => {
  const vm = await createVm([{ target: 'vda', size: 16 * MiB }])
  const manifest = await backup()
  await changeDefinition(manifest, ofAnotherHost)
  await vm.start()
  await vm.io('vda', 'write -P 0x22 4M 8M')
  const inactive = () => site.lab.virsh(['dumpxml', '--inactive', vm.name])
  const definition = await inactive()
  const request = {
    backup: manifest.id,
    to: { instance: vm.name },
    definition: 'restore',
    ...AT_ONCE,
  } as const
  const asItWas = async () => {
    expect(await vm.state()).toBe('running')
    expect(await inactive()).toBe(definition)
    await site.expectHolds('vda', 'read -P 0 0 4M', 'read -P 0x22 4M 8M', 'read -P 0 12M 4M')
    await expectCleanHost([`varve-${manifest.id}`])
    expect(await readdir(site.folder)).toEqual(['state', 'storage', 'vda'])
  }
  await expect(restore(request)).rejects.toMatchObject(REFUSED)
  await asItWas()

  // One that is damaged on the storage is found out before the guest has to stop.
  const stored = await readFile(site.stored(manifest, 'domain.xml'), 'utf8')
  await writeFile(site.stored(manifest, 'domain.xml'), stored.replace('pc-q35', 'pc-q53'))
  const pid = await vm.qemuPid()
  await expect(restore(request)).rejects.toMatchObject({ code: 'DIGEST_MISMATCH' })
  expect(await vm.qemuPid()).toBe(pid)
  await writeFile(site.stored(manifest, 'domain.xml'), stored)

  // The process dies, or libvirt gives no answer, right when the definition is to go in.
  class Silent extends LibvirtHost {
    override define(): Promise<void> {
      return Promise.reject(new VarveError('COMMAND_TIMEOUT', 'virsh define did not end.'))
    }
  }
  const { stateDir, storage } = site
  const pipeline = new RestorePipeline({ host: new Silent({ uri: site.lab.uri }), storage, stateDir })
  await expect(pipeline.run(request)).rejects.toMatchObject({ code: 'COMMAND_TIMEOUT' })
  expect(await recoverNow()).toMatchObject({ ok: true, runs: [{ outcome: 'undone' }] })
  await asItWas()
})

thoroughTest(
  'a definition that libvirt refuses leaves disks and UEFI variables as they were, no copy, or in place restored disks',
  async () => {
    const vm = await createVm([{ target: 'vda', size: 16 * MiB }], { uefi: true })
    const nvram = vm.nvram ?? expect.fail('no UEFI')
    await vm.start() // makes its UEFI variables
    await vm.destroy()
    const manifest = await backup()
    await changeDefinition(manifest, ofAnotherHost)
    const wanted = await content('vda')
    await qemuIo(image('vda'), 'qcow2', ['write -P 0x22 4M 8M'])
    await using variables = await open(nvram, 'r+')
    await variables.write('theirs', 1000)
    const before = [await content('vda'), await sha256File(nvram)]
    const directory = join(site.folder, 'copies')
    await mkdir(directory)

    const over = { backup: manifest.id, to: { instance: vm.name }, definition: 'restore' } as const
    await expect(restore(over)).rejects.toMatchObject(REFUSED)
    expect([await content('vda'), await sha256File(nvram)]).toEqual(before)
    await expectCleanHost([`varve-${manifest.id}`])

    const copy = `${vm.name}-copy`
    const to = { newInstance: copy, directory }
    await expect(restore({ backup: manifest.id, to, start: true })).rejects.toMatchObject(REFUSED)
    expect(await readdir(directory)).toEqual([])
    await expect(site.host.instance(copy)).rejects.toMatchObject({ code: 'INSTANCE_NOT_FOUND' })

    await expect(restore({ ...over, inPlace: true })).rejects.toMatchObject({
      code: 'COMMAND_FAILED',
      message: expect.stringContaining('only its disks were restored'),
    })
    expect(await content('vda')).toBe(wanted)
  },
)

test('a copy whose definition was cut short is defined by recover, be it defined already or not', async () => {
  const vm = await createVm([{ target: 'vda', size: 16 * MiB }])
  const manifest = await backup()
  const wanted = await content('vda')
  const copy = `${vm.name}-copy`
  class Lost extends LibvirtHost {
    override async define(...args: Parameters<LibvirtHost['define']>): Promise<void> {
      await super.define(...args)
      throw new VarveError('COMMAND_TIMEOUT', 'virsh define did not end.')
    }
  }
  const { stateDir, storage } = site
  const pipeline = new RestorePipeline({ host: new Lost({ uri: site.lab.uri }), storage, stateDir })
  const to = { newInstance: copy, directory: site.folder }
  await expect(pipeline.run({ backup: manifest.id, to })).rejects.toMatchObject({ code: 'COMMAND_TIMEOUT' })
  try {
    expect(await recoverNow()).toMatchObject({ ok: true, runs: [{ outcome: 'finished' }] })
    const path = join(site.folder, `${copy}-vda.qcow2`)
    expect((await site.host.instance(copy)).disks).toMatchObject([{ name: 'vda', path }])
    expect(await sha256Content(path, 'qcow2')).toBe(wanted)
  } finally {
    await site.lab.virsh(['undefine', copy])
  }
})

test.for(['its old UUID', 'another UUID'])(
  'a new instance replaces none of its name that somebody defined with %s meanwhile',
  async uuid => {
    const vm = await createVm([{ target: 'vda', size: 16 * MiB }])
    const manifest = await backup()
    const original = await site.lab.virsh(['dumpxml', '--inactive', vm.name])
    const other = original.replace(/<uuid>.*<\/uuid>/, `<uuid>${randomUUID()}</uuid>`)
    const theirs = uuid === 'another UUID' ? other : original
    const directory = join(site.folder, 'new')
    await mkdir(directory)
    const definition = join(site.folder, 'theirs.xml')
    await writeFile(definition, theirs)
    await site.lab.virsh(['undefine', vm.name])
    const defined = onStage('swap', () =>
      execaSync('virsh', ['--connect', site.lab.uri, 'define', definition]),
    )
    const request = { backup: manifest.id, to: { newInstance: vm.name, directory } }
    const failed = await restore(request, defined).catch((error: unknown) => error)
    expect(await site.lab.virsh(['dumpxml', '--inactive', vm.name])).toBe(theirs)
    expect(failed).toMatchObject({ code: 'TARGET_EXISTS', context: { instance: vm.name } })
    expect(await readdir(directory)).toEqual([])
    expect(await recoverNow()).toEqual({ ok: true, runs: [] })
  },
)

test("a backing file that the definition names for itself does not show through the restored disk's zeros", async () => {
  const vm = await createVm([{ target: 'vda', size: 16 * MiB }])
  await vm.start()
  const holds = (...reads: string[]) => site.expectHolds('vda', ...reads)
  await vm.io('vda', 'write -P 0x11 0 4M')
  const wanted = ['read -P 0x11 0 4M', 'read -P 0 4M 12M']
  const manifest = await backup()
  await vm.io('vda', 'write -P 0x22 8M 4M')
  const overlay = join(site.folder, 'theirs')
  const snapshot = (file: string) => [
    ...['snapshot-create-as', vm.name, '--disk-only', '--no-metadata'],
    ...['--diskspec', `vda,snapshot=external,file=${file}`],
  ]
  await site.lab.virsh(snapshot(overlay))
  await vm.io('vda', 'write -P 0x33 14M 1M')
  const request = { backup: manifest.id, to: { instance: vm.name }, ...AT_ONCE } as const
  const definition = () => site.lab.virsh(['dumpxml', '--inactive', '--security-info', vm.name])
  expect(await definition()).toContain('<backingStore type')
  const withPassword = (await definition()).replace(
    '</devices>',
    "<graphics type='vnc' port='-1' passwd='console7'/></devices>",
  )
  await site.host.define(withPassword)
  const before = await definition()

  // Given up before the point of no return, it leaves the definition as it was.
  const given = new AbortController()
  const giveUp = onStage('power-off', () => given.abort(new Error('enough')))
  await expect(restore(request, { ...giveUp, signal: given.signal })).rejects.toMatchObject({
    code: 'ABORTED',
  })
  expect(await definition()).toBe(before)
  await holds('read -P 0x11 0 4M', 'read -P 0 4M 4M', 'read -P 0x22 8M 4M', 'read -P 0x33 14M 1M')

  // The process dies right when the definition is to be changed.
  class Silent extends LibvirtHost {
    override dropBacking(): Promise<void> {
      return Promise.reject(new VarveError('COMMAND_TIMEOUT', 'virsh define did not end.'))
    }
  }
  const { stateDir, storage } = site
  const events: VarveEvent[] = []
  const onEvent = (event: VarveEvent) => void events.push(event)
  const pipeline = new RestorePipeline({ host: new Silent({ uri: site.lab.uri }), storage, stateDir })
  await expect(pipeline.run(request, { onEvent })).rejects.toMatchObject({ code: 'COMMAND_TIMEOUT' })
  expect(await definition()).toBe(before)
  const report = await recover({ stateDir, storages: [storage] }, { onEvent })
  expect(report).toMatchObject({ ok: true, runs: [{ outcome: 'finished' }] })
  expect(await definition()).not.toContain('<backingStore type')
  expect(await definition()).toContain("passwd='console7'")
  expect(JSON.stringify(events)).not.toContain('console7')
  await holds(...wanted)
  expect((await site.host.instance(vm.name)).disks).toMatchObject([{ path: overlay }])
  await vm.io('vda', 'write -P 0x44 14M 1M')

  await site.lab.virsh(snapshot(join(site.folder, 'again')))
  await restore({ ...request, inPlace: true })
  await holds(...wanted)
  await vm.io('vda', 'write -P 0x44 14M 1M')

  await restore({ ...request, definition: 'restore' })
  expect(await vm.xml()).not.toContain(image('vda'))
  expect(await vm.xml()).not.toContain(overlay)
  await holds(...wanted)

  // In the end the disk is on another file: somebody makes a snapshot while the new disk is written.
  const made = join(site.folder, 'meanwhile')
  const meanwhile = onStage('write', () => {
    execaSync('virsh', ['--connect', site.lab.uri, ...snapshot(made)])
  })
  await vm.io('vda', 'write -P 0x55 9M 1M')
  await expect(restore(request, meanwhile)).rejects.toMatchObject({ code: 'DISK_BUSY' })
  expect((await site.host.instance(vm.name)).disks).toMatchObject([{ path: made }])
  await holds('read -P 0x11 0 4M', 'read -P 0 4M 5M', 'read -P 0x55 9M 1M', 'read -P 0 10M 6M')
})

test('UEFI variables that cannot be written are told of by their path, and nothing is changed', async () => {
  const vm = await createVm([{ target: 'vda', size: 16 * MiB }], { uefi: true, memoryMiB: 256 })
  const nvram = vm.nvram ?? expect.fail('no UEFI')
  await writeFile(nvram, 'variables')
  const { id } = await backup()
  const before = await site.content('vda')
  const definition = await site.lab.virsh(['dumpxml', '--inactive', vm.name])
  const gone = join(site.folder, 'gone', 'vars.fd')
  await site.host.define(definition.replace(nvram, gone))
  await expect(
    restore({ backup: id, to: { instance: vm.name }, definition: 'restore' }),
  ).rejects.toMatchObject({
    code: 'TARGET_FAILED',
    message: expect.stringMatching(/gone\/vars\.fd.*could not be written.*ENOENT.*Check the path/s),
  })
  expect(await site.content('vda')).toBe(before)
  await site.host.define(definition)
  await rm(nvram)
})
