import { execFileSync } from 'node:child_process'
import { rm, stat, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { createQcow2, qemuIo, sha256Content } from '@varve/testkit/lab'
import { execa } from 'execa'
import { expect, onTestFinished, test, vi } from 'vitest'
import { VarveError } from '../src/errors.ts'
import type { VarveEvent } from '../src/events.ts'
import { type DiskOverlay, isFileDisk, type MergeRecord, type MergeState } from '../src/host.ts'
import { MiB, useVmSite } from './vm-site.ts'

const site = useVmSite()
const { createVm, image, backup } = site

const overlayOf = (name: string): DiskOverlay => ({
  disk: 'vda',
  base: image('vda'),
  baseFormat: 'qcow2',
  overlay: join(site.folder, name),
})

/** As a run's journal keeps it. */
function mergeRecord(state?: MergeRecord['state'], uuid?: string): MergeRecord {
  const record = {
    state,
    ...(uuid !== undefined && { uuid }),
    record: async (next: MergeState) => {
      record.state = next
    },
  }
  return record
}

function createOverlay({ base, overlay }: DiskOverlay): void {
  execFileSync('qemu-img', ['create', '-q', '-f', 'qcow2', '-F', 'qcow2', '-b', base, overlay])
}

/** Has libvirt be told something else once, right before one of several questions that virsh asks in one start. */
async function amid(question: string, theirs: string): Promise<void> {
  const [done, program] = [join(site.folder, 'done'), join(site.folder, 'virsh')]
  await rm(done, { force: true })
  const script = `#!/bin/bash
line="\${@: -1}"
if [[ $line == *"$QUESTION"* && ! -e '${done}' ]]; then
  touch '${done}'
  set -- "\${@:1:$#-1}" "\${line/"$QUESTION"/"$THEIRS; $QUESTION"}"
fi
PATH="\${PATH#*:}" exec virsh "$@"
`
  await writeFile(program, script, { mode: 0o755 })
  vi.unstubAllEnvs()
  for (const [name, value] of Object.entries({ QUESTION: question, THEIRS: theirs })) vi.stubEnv(name, value)
  vi.stubEnv('PATH', `${site.folder}:${process.env.PATH}`)
  onTestFinished(() => void vi.unstubAllEnvs())
}

test("a snapshot that somebody takes between two backups makes the next one full, since its bitmap is libvirt's empty copy", async () => {
  const vm = await createVm([{ target: 'vda', size: 16 * MiB }])
  await vm.start()
  const write = (at: number) => vm.io('vda', `write -P ${0x40 + at} ${at}M 1M`)
  await write(0)
  const before = await backup()
  await write(4)
  const spec = `vda,snapshot=external,file=${join(site.folder, 'theirs')}`
  const theirs = ['snapshot-create-as', vm.name, '--disk-only', '--no-metadata', '--diskspec', spec]
  await site.lab.virsh(theirs)
  await write(8)
  const holds = (...places: number[]) => places.map(at => `read -P ${0x40 + at} ${at}M 1M`)

  const after = await backup()
  expect(after.disks[0]).toMatchObject({ kind: 'full', fallback: 'disk-replaced' })
  expect(after.chain).not.toBe(before.chain)
  await site.expectStored(after, [...holds(0, 4, 8), 'read -P 0 9M 7M'])
  await write(12)
  const next = await backup()
  expect(next).toMatchObject({ kind: 'incremental', parent: after.id })
  await site.expectStored(next, [...holds(0, 4, 8, 12), 'read -P 0 13M 3M'])
})

test('a name that is a number is no id of another domain', async () => {
  const vm = await createVm([{ target: 'vda', size: MiB }])
  await vm.start()
  const id = (await site.lab.virsh(['domid', vm.name])).trim()
  const path = join(site.folder, 'other')
  await createQcow2(path, MiB)
  const other = await site.lab.createDomain({ name: id, disks: [{ target: 'vda', path, format: 'qcow2' }] })
  try {
    const instance = await site.host.instance(id)
    expect(instance).toMatchObject({ name: id, running: false })
    expect(instance.disks[0]?.path).toBe(path)
    await site.host.powerOff(id, 1000) // is off already
    expect(await vm.state()).toBe('running')
    await expect(site.host.instance(`${id}${id}`)).rejects.toMatchObject({ code: 'INSTANCE_NOT_FOUND' })
  } finally {
    // virsh would take its name for the other's id
    const list = await site.lab.virsh(['list', '--all', '--uuid', '--name'])
    const uuid = list.split('\n').find(line => line.trim().endsWith(` ${other.name}`))
    await site.lab.virsh(['undefine', uuid?.trim().split(/\s+/)[0] ?? ''])
  }
})

test('a name with all that virsh would take for something else is that of the domain', async () => {
  const name = `it's "odd"; echo \\x $(y) #z`
  const vm = await createVm([{ target: 'vda', size: MiB }], { name })
  expect(await site.host.instance(name)).toMatchObject({ name, running: false })
  await vm.start()
  await backup({ instance: name })
  expect(await site.host.instance(name)).toMatchObject({ name, running: true })
  for (const unknown of [`${name} `, "it's", `"odd"`]) {
    const error = await site.host.instance(unknown).catch(error => error)
    expect(error).toMatchObject({ code: 'INSTANCE_NOT_FOUND' })
  }
  await vm.destroy()
})

test('an instance that goes off while it is looked at is no running one, nor is one whose drives QEMU does not tell', async () => {
  const vm = await createVm([{ target: 'vda', size: MiB }])
  const { host } = site
  const asked = `qemu-monitor-command '${vm.name}' '{"execute":`
  for (const [question, running] of [
    ['"query-named-block-nodes"', undefined],
    ['"query-block"', true],
  ] as const) {
    await vm.start()
    await amid(`${asked}${question}`, `destroy '${vm.name}'`)
    const looking = host.instance(vm.name)
    if (running) {
      const instance = await looking
      expect(instance.running).toBe(true)
      await expect(host.assertBacking(instance, instance.disks.filter(isFileDisk))).rejects.toMatchObject({
        code: 'COMMAND_FAILED',
        message: expect.stringContaining('not running'),
      })
    } else {
      await expect(looking).rejects.toMatchObject({
        code: 'COMMAND_FAILED',
        message: expect.stringContaining('went off'),
        retryable: true,
      })
    }
    expect(await host.instance(vm.name)).toMatchObject({ running: false })
  }
})

test('bitmaps go from all disks but the one that keeps its own, and also where the instance goes off meanwhile', async () => {
  const names = ['vda', 'vdb']
  const vm = await createVm(names.map(target => ({ target, size: MiB })))
  await vm.start()
  const bitmaps = async () => {
    const disks = (await site.host.instance(vm.name)).disks.filter(isFileDisk)
    return disks.map(({ bitmaps }) => bitmaps.map(({ name }) => name).sort())
  }
  const changes = (...remove: string[]) =>
    names.map(name => ({ disk: { name, path: image(name) }, remove, seal: 'varve-kept' }))
  const disks = (await site.host.instance(vm.name)).disks.filter(isFileDisk)
  for (const bitmap of ['varve-kept', 'varve-one', 'varve-two'])
    await site.host.addBitmap(vm.name, disks, bitmap, 65536)
  for (const name of names) await vm.io(name, 'write 0 64k')
  const sealed = ['varve-kept', 'varve-one', 'varve-two']
  expect(await bitmaps()).toEqual([sealed, sealed])

  const socket = join(site.folder, 'nbd.sock')
  await vm.qmp('nbd-server-start', { addr: { type: 'unix', data: { path: socket } } })
  const found = await vm.qmp('query-named-block-nodes', { flat: true })
  const nodes = found as { 'node-name': string; drv: string; file: string }[]
  const node = nodes.find(({ drv, file }) => drv === 'qcow2' && file === image('vda'))?.['node-name']
  await vm.qmp('block-dirty-bitmap-disable', { node, name: 'varve-one' })
  const exported = { type: 'nbd', id: 'theirs', 'node-name': node, bitmaps: ['varve-one'] }
  await vm.qmp('block-export-add', exported)
  await expect(site.host.changeBitmaps(vm.name, changes('varve-one'))).rejects.toMatchObject({
    code: 'COMMAND_FAILED',
    message: expect.stringContaining('varve-one'),
  })
  expect(await bitmaps()).toEqual([sealed, ['varve-kept', 'varve-two']])
  await vm.qmp('nbd-server-stop')
  await site.host.changeBitmaps(vm.name, changes('varve-one'))
  expect(await bitmaps()).toEqual([
    ['varve-kept', 'varve-two'],
    ['varve-kept', 'varve-two'],
  ])

  await amid(`qemu-monitor-command '${vm.name}'`, `destroy '${vm.name}'`)
  await site.host.changeBitmaps(vm.name, changes('varve-two'))
  expect(await vm.state()).toBe('shut off')
  expect(await bitmaps()).toEqual([['varve-kept'], ['varve-kept']])
})

test('a snapshot is seen through although the run is given up, so that its overlay can be merged back', async () => {
  const vm = await createVm([{ target: 'vda', size: MiB }])
  await vm.start()
  const overlay = overlayOf('overlay')
  const giveUp = new AbortController()
  await site.host.snapshot(vm.name, [overlay], {
    signal: giveUp.signal,
    onEvent: event => {
      // the last look before the snapshot
      if (event.type === 'command' && event.args.some(arg => arg.includes('--inactive'))) giveUp.abort()
    },
  })
  expect(giveUp.signal.aborted).toBe(true)
  expect((await site.host.instance(vm.name)).disks[0]?.path).toBe(overlay.overlay)
  await site.host.commitOverlay(vm.name, overlay, mergeRecord())
  expect((await site.host.instance(vm.name)).disks[0]?.path).toBe(image('vda'))
  await expect(stat(overlay.overlay)).rejects.toMatchObject({ code: 'ENOENT' })
})

test("an overlay that QEMU has open is not removed, whatever the domain's definition says", async () => {
  const vm = await createVm([{ target: 'vda', size: MiB }])
  await vm.start()
  const overlay = overlayOf('overlay')
  createOverlay(overlay)
  const node = { driver: 'qcow2', 'node-name': 'soon', file: { driver: 'file', filename: overlay.overlay } }
  await vm.qmp('blockdev-add', { ...node, 'read-only': true, backing: null })
  await expect(site.host.commitOverlay(vm.name, overlay, mergeRecord())).rejects.toMatchObject({
    code: 'BLOCK_COMMIT_FAILED',
  })
  await stat(overlay.overlay)
  await vm.qmp('blockdev-del', { 'node-name': 'soon' })
  await site.host.commitOverlay(vm.name, overlay, mergeRecord())
  await expect(stat(overlay.overlay)).rejects.toMatchObject({ code: 'ENOENT' })
})

test('what the guest wrote to an overlay is kept, whatever somebody defines meanwhile', async () => {
  const vm = await createVm([{ target: 'vda', size: MiB }])
  const definition = join(site.folder, 'theirs.xml')
  const overlay = overlayOf('overlay')
  await vm.start()
  await vm.io('vda', 'write -P 1 0 128k')
  await writeFile(definition, await site.lab.virsh(['dumpxml', '--inactive', vm.name]))
  const defineOnTheBase = async () => {
    await site.lab.virsh(['define', definition])
    await vm.destroy()
    expect((await site.host.instance(vm.name)).disks[0]?.path).toBe(overlay.base)
  }
  await site.host.snapshot(vm.name, [overlay])
  await vm.io('vda', 'write -P 2 64k 64k')
  await defineOnTheBase()
  await site.host.commitOverlay(vm.name, overlay, mergeRecord())
  await qemuIo(overlay.base, 'qcow2', ['read -P 1 0 64k', 'read -P 2 64k 64k'])
  expect((await site.host.instance(vm.name)).disks[0]?.path).toBe(overlay.base)
  await expect(stat(overlay.overlay)).rejects.toMatchObject({ code: 'ENOENT' })

  // Where the guest has gone on on the base, nobody but its owner knows which of the two holds.
  await vm.start()
  await site.host.snapshot(vm.name, [overlay])
  await vm.io('vda', 'write -P 3 64k 64k')
  await defineOnTheBase()
  await vm.start()
  await vm.io('vda', 'write -P 4 0 64k')
  const merging = () => site.host.commitOverlay(vm.name, overlay, mergeRecord())
  const refused = {
    code: 'BLOCK_COMMIT_FAILED',
    message: expect.stringContaining('definition was changed'),
  }
  await expect(merging()).rejects.toMatchObject(refused)
  await vm.destroy()
  await expect(merging()).rejects.toMatchObject(refused)
  await qemuIo(overlay.overlay, 'qcow2', ['read -P 3 64k 64k'])
  await qemuIo(overlay.base, 'qcow2', ['read -P 4 0 64k', 'read -P 2 64k 64k'])
})

test('the overlay of an instance that is gone is merged, unless it was before, or may have been', async () => {
  const overlay = overlayOf('overlay')
  const merging = (state: MergeRecord['state']) =>
    site.host.commitOverlay('gone', overlay, mergeRecord(state))
  const reads = (pattern: number) => qemuIo(overlay.base, 'qcow2', [`read -P ${pattern} 0 64k`])
  await createQcow2(overlay.base, MiB)
  await qemuIo(overlay.base, 'qcow2', ['write -P 1 0 64k'])
  createOverlay(overlay)
  await qemuIo(overlay.overlay, 'qcow2', ['write -P 2 0 64k'])
  await expect(merging('pivot')).rejects.toMatchObject({
    code: 'BLOCK_COMMIT_FAILED',
    message: expect.stringContaining('cannot be told any more'),
  })
  await reads(1)
  await merging(undefined)
  await reads(2)
  await qemuIo(overlay.base, 'qcow2', ['write -P 3 0 64k'])
  createOverlay(overlay)
  await qemuIo(overlay.overlay, 'qcow2', ['write -P 2 0 64k'])
  await merging('merged')
  await reads(3)
  await expect(stat(overlay.overlay)).rejects.toMatchObject({ code: 'ENOENT' })
})

test('an instance or a disk that somebody renames is on its base once its overlay is merged', async () => {
  const vm = await createVm([{ target: 'vda', size: MiB }])
  const overlay = overlayOf('overlay')
  const definition = join(site.folder, 'domain.xml')
  const renamings = {
    domain: () => site.lab.virsh(['domrename', vm.name, 'renamed']),
    disk: async () => {
      const xml = await site.lab.virsh(['dumpxml', '--inactive', vm.name])
      await writeFile(definition, xml.replace("dev='vda'", "dev='vdc'"))
      await site.lab.virsh(['define', definition])
    },
  }
  for (const [index, [what, rename]] of Object.entries(renamings).entries()) {
    await vm.start()
    await site.host.snapshot(vm.name, [overlay])
    await vm.io('vda', `write -P ${index + 1} 0 64k`)
    await vm.destroy()
    await rename()
    await site.host.commitOverlay(vm.name, overlay, mergeRecord())
    if (what === 'domain') await site.lab.virsh(['domrename', 'renamed', vm.name])
    const { disks } = await site.host.instance(vm.name)
    expect(disks).toMatchObject([{ name: what === 'disk' ? 'vdc' : 'vda', path: overlay.base }])
    await qemuIo(overlay.base, 'qcow2', [`read -P ${index + 1} 0 64k`])
    await expect(stat(overlay.overlay)).rejects.toMatchObject({ code: 'ENOENT' })
  }
})

test('an instance that somebody renames is on its base once its overlay is merged, also where another one has its name', async () => {
  const vm = await createVm([{ target: 'vda', size: MiB }])
  const overlay = overlayOf('overlay')
  const define = async (xml: string) => {
    const definition = join(site.folder, 'domain.xml')
    await writeFile(definition, xml)
    await site.lab.virsh(['define', definition])
  }
  const former = await site.lab.virsh(['dumpxml', '--inactive', vm.name])
  const uuid = /<uuid>(.*)<\/uuid>/.exec(former)?.[1] ?? expect.fail()
  const merging = () => site.host.commitOverlay(vm.name, overlay, mergeRecord(undefined, uuid))
  await vm.start()
  await site.host.snapshot(vm.name, [overlay])
  await vm.io('vda', 'write -P 1 0 64k')
  await vm.destroy()
  await site.lab.virsh(['domrename', vm.name, 'renamed'])
  const renamed = await site.lab.virsh(['dumpxml', '--inactive', 'renamed'])
  const other = join(site.folder, 'other')
  await createQcow2(other, MiB)
  await define(former.replace(/<uuid>.*<\/uuid>/, '').replace(overlay.base, other))

  const top = join(site.folder, 'top')
  createOverlay({ ...overlay, base: overlay.overlay, overlay: top })
  await define(renamed.replace(overlay.overlay, top))
  await expect(merging()).rejects.toMatchObject({
    code: 'BLOCK_COMMIT_FAILED',
    message: expect.stringContaining(`the disk writes to ${top} by now`),
  })
  await qemuIo(top, 'qcow2', ['read -P 1 0 64k'])

  await define(renamed)
  await merging()
  expect((await site.host.disks('renamed')).disks).toMatchObject([{ path: overlay.base }])
  expect((await site.host.disks(vm.name)).disks).toMatchObject([{ path: other }])
  await qemuIo(overlay.base, 'qcow2', ['read -P 1 0 64k'])
  await expect(stat(overlay.overlay)).rejects.toMatchObject({ code: 'ENOENT' })
  await vm.undefine()
  await site.lab.virsh(['domrename', 'renamed', vm.name])
})

test('an instance that is started while its overlay is merged back keeps what it writes to it', async () => {
  const vm = await createVm([{ target: 'vda', size: MiB }])
  const start = ['start', vm.name]
  const overlay = overlayOf('overlay')
  await vm.start()
  await site.host.snapshot(vm.name, [overlay])
  await vm.io('vda', 'write -P 1 0 64k')
  await vm.destroy()
  const startOnce = (event: VarveEvent) => {
    if (event.type === 'command' && event.args[0] === 'commit')
      execFileSync('virsh', ['--quiet', '--connect', site.lab.uri, ...start])
  }
  await expect(
    site.host.commitOverlay(vm.name, overlay, mergeRecord(), { onEvent: startOnce }),
  ).rejects.toMatchObject({
    code: 'BLOCK_COMMIT_FAILED',
    message: expect.stringContaining('was started on it meanwhile'),
  })
  await vm.io('vda', 'write -P 2 64k 64k')
  await site.host.commitOverlay(vm.name, overlay, mergeRecord())
  await vm.destroy()
  const { stdout } = await execa('qemu-io', [
    '-r',
    '-f',
    'qcow2',
    '-c',
    'read -P 1 0 64k',
    '-c',
    'read -P 2 64k 64k',
    image('vda'),
  ])
  expect(stdout).not.toMatch(/failed/i)
  expect((await site.host.instance(vm.name)).disks[0]?.path).toBe(image('vda'))
})

test('a transient instance that goes right after its disk was put back onto its base needs its overlay no more, and before that it does', async () => {
  const vm = await createVm([{ target: 'vda', size: MiB }])
  const definition = join(site.folder, 'vm.xml')
  await writeFile(definition, await site.lab.virsh(['dumpxml', vm.name]))
  const overlay = overlayOf('overlay')
  for (const [question, pattern] of [
    [`dumpxml '${vm.name}'`, 1],
    [`blockjob '${vm.name}' 'vda' '--pivot'`, 2],
  ] as const) {
    await vm.start()
    await site.lab.virsh(['undefine', vm.name])
    await site.host.snapshot(vm.name, [overlay])
    await vm.io('vda', `write -P ${pattern} 0 64k`)
    await amid(question, `destroy '${vm.name}'`)
    const merge = mergeRecord()
    const merging = site.host.commitOverlay(vm.name, overlay, merge)
    if (pattern === 1) {
      await merging
      expect(merge.state).toBe('merged')
      await expect(stat(overlay.overlay)).rejects.toMatchObject({ code: 'ENOENT' })
      await qemuIo(overlay.base, 'qcow2', ['read -P 1 0 64k'])
    } else {
      await expect(merging).rejects.toMatchObject({ code: 'BLOCK_COMMIT_FAILED' })
      expect(merge.state).toBe('pivot')
      await qemuIo(overlay.overlay, 'qcow2', ['read -P 2 0 64k'])
    }
    await site.lab.virsh(['define', definition])
  }
})

test('a storage that takes nothing is noticed before anything is done to the instance', async () => {
  const vm = await createVm([{ target: 'vda', size: MiB }])
  await vm.start()
  site.storage.beforePut = async () => {
    throw new VarveError('STORAGE_FULL', 'full')
  }
  await expect(backup()).rejects.toMatchObject({ code: 'STORAGE_FULL' })
  expect(site.events.flatMap(event => (event.type === 'stage' ? [event.stage] : []))).toEqual(['plan'])
  const changes = /bitmap-(add|remove)|snapshot-create-as|blockcommit/
  expect(site.events.filter(event => changes.test(JSON.stringify(event)))).toEqual([])
})

test("the password of an instance's console stays when an overlay is merged back into one that has stopped", async () => {
  const vm = await createVm([{ target: 'vda', size: MiB }])
  const overlay = overlayOf('overlay')
  const xml = await site.lab.virsh(['dumpxml', vm.name])
  const withPassword = xml
    .replace('</devices>', "<graphics type='vnc' port='-1' passwd='console7'/></devices>")
    .replace(overlay.base, overlay.overlay)
  createOverlay(overlay)
  const events: unknown[] = []
  await site.host.define(withPassword)
  await site.host.commitOverlay(vm.name, overlay, mergeRecord(), {
    onEvent: event => void events.push(event),
  })
  const after = await site.lab.virsh(['dumpxml', '--inactive', '--security-info', vm.name])
  expect(after).toContain("passwd='console7'")
  expect(after).toContain(overlay.base)
  expect(after).not.toContain(overlay.overlay)
  expect(events.length).toBeGreaterThan(2)
  expect(JSON.stringify(events)).not.toContain('console7')
})

test('a guest that is paused, and so cannot shut down, is switched off, and one that is off, or gone, is not frozen', async () => {
  const vm = await createVm([{ target: 'vda', size: MiB }])
  await vm.start()
  await site.lab.virsh(['suspend', vm.name])
  await site.host.powerOff(vm.name, 60_000)
  expect(await vm.state()).toBe('shut off')
  await site.host.powerOff(vm.name, 60_000) // is off already
  for (const name of [vm.name, 'gone']) await site.host.thawFilesystems(name)
})

test('an instance is started where it does not run, and not switched off where libvirt was away when it was to be shut down', async () => {
  const vm = await createVm([{ target: 'vda', size: MiB }])
  await site.host.start(vm.name)
  const pid = await vm.qemuPid()
  await site.host.start(vm.name)
  await expect(site.host.start('gone')).rejects.toMatchObject({ code: 'INSTANCE_NOT_FOUND' })
  const away = `qemu+unix:///system?socket=${join(site.folder, 'no-socket')}`
  const script = `#!/bin/bash
[[ " $* " != *' shutdown '* ]] || set -- --connect '${away}' list
PATH="\${PATH#*:}" exec virsh "$@"
`
  await writeFile(join(site.folder, 'virsh'), script, { mode: 0o755 })
  vi.stubEnv('PATH', `${site.folder}:${process.env.PATH}`)
  onTestFinished(() => void vi.unstubAllEnvs())
  await expect(site.host.powerOff(vm.name, 60_000)).rejects.toMatchObject({
    code: 'POWER_OFF_FAILED',
    message: expect.stringContaining('libvirt does not answer'),
  })
  expect(await vm.state()).toBe('running')
  expect(await vm.qemuPid()).toBe(pid)
})

test('a transient instance is backed up, also where it goes meanwhile, and no restore makes it vanish', async () => {
  const vm = await createVm([{ target: 'vda', size: 4 * MiB }])
  const definition = await site.lab.virsh(['dumpxml', vm.name])
  const write = (where: string) => vm.io('vda', `write -P 0x33 ${where}`)
  await vm.start()
  await site.lab.virsh(['undefine', vm.name])
  await write('0 1M')
  const full = await site.backup()
  for (const inPlace of [false, true]) {
    await expect(site.restore({ backup: full.id, to: { instance: vm.name }, inPlace })).rejects.toMatchObject(
      { code: 'INSTANCE_TRANSIENT', message: expect.stringContaining('virsh define') },
    )
  }
  expect(await vm.state()).toBe('running')

  site.storage.beforePut = async key => {
    if (!key.endsWith('vda.qcow2')) return
    await write('2M 1M')
    await vm.destroy()
  }
  const last = await site.backup()
  expect(last).toMatchObject({ kind: 'incremental', parent: full.id })
  const written = await sha256Content(site.image('vda'), 'qcow2')
  await site.expectStored(last, ['read -P 0x33 0 1M', 'read -P 0 1M 3M'])

  const file = join(site.folder, 'vm.xml')
  await writeFile(file, definition)
  await site.lab.virsh(['define', file])
  // The old bitmap was removed from the file itself, which no instance had.
  await site.expectCleanHost([`varve-${last.id}`])
  site.storage.beforePut = undefined
  const next = await site.backup()
  expect(next).toMatchObject({ kind: 'incremental', parent: last.id })
  await site.expectCleanHost([`varve-${next.id}`])
  expect(await site.storedSums(next)).toEqual({ vda: written })
})
