import { createHash } from 'node:crypto'
import { existsSync } from 'node:fs'
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import {
  type BackupManifest,
  BackupPipeline,
  type BackupRequest,
  ChainManager,
  LibvirtHost,
  RestorePipeline,
  recover,
  type VarveEvent,
} from '@varve/core'
import { LocalDriver } from '@varve/driver-local'
import {
  createQcow2,
  type LabDomain,
  type LibvirtLab,
  qemuIo,
  readContent,
  startLibvirt,
} from '@varve/testkit/lab'
import { thoroughTest } from '@varve/testkit/thorough'
import { execaSync } from 'execa'
import { afterAll, afterEach, beforeAll, beforeEach, expect, test } from 'vitest'
import { CephConnector } from '../src/index.ts'
import { RbdSite } from './rbd-site.ts'

const MIB = 1024 ** 2
/** Where the part of a disk begins that no number is written to. */
const KEPT_FROM = 4096

let site: RbdSite
let lab: LibvirtLab
let secretUuid: string
let folder: string
let storage: LocalDriver
let host: LibvirtHost
let vm: LabDomain | undefined
let events: VarveEvent[]

beforeAll(async () => {
  site = await RbdSite.start()
  lab = await startLibvirt()
  secretUuid = await lab.defineCephSecret(site.user.secret)
  // No configuration of Ceph's: all that is needed is in the domain and in libvirt's secret.
  host = new LibvirtHost({ uri: lab.uri, rbd: new CephConnector({ conf: '/dev/null' }) })
})
afterAll(async () => {
  await lab.stop()
  await site[Symbol.asyncDispose]()
})
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'varve-vm-rbd-'))
  storage = new LocalDriver({ path: join(folder, 'storage'), create: true })
  events = []
})
afterEach(async () => {
  if (vm && (await vm.state()) !== 'shut off') await vm.destroy()
  await vm?.undefine()
  vm = undefined
  await rm(folder, { recursive: true })
})

const onEvent = (event: VarveEvent) => void events.push(event)
const pipelines = () => ({ host, storage, stateDir: join(folder, 'state') })
const commands = () =>
  events.flatMap(event => (event.type === 'command' ? [[event.command, ...event.args].join(' ')] : []))

/** An instance whose vda is an RBD image and whose vdb, where it has one, a qcow2 file. */
async function createVm(
  image: string,
  options: {
    withFile: boolean
    guest: boolean
    /** An RBD image as vdc. */
    second?: string
    agent?: boolean
    /** Libvirt's secret of the key. Default: one that libvirt hands out. */
    secret?: string
  },
): Promise<LabDomain> {
  const { withFile, guest, second, agent = false, secret = secretUuid } = options
  const file = join(folder, 'vdb.qcow2')
  if (withFile) await createQcow2(file, 4 * MIB)
  const rbd = { monitor: site.ceph.monitor, user: site.user.user, secretUuid: secret }
  const raw = { format: 'raw', discard: 'unmap', rbd } as const
  vm = await lab.createDomain({
    name: 'web-1',
    guest,
    agent,
    disks: [
      { target: 'vda', path: image, ...raw },
      ...(withFile ? [{ target: 'vdb', path: file, format: 'qcow2', discard: 'unmap' } as const] : []),
      ...(second === undefined ? [] : [{ target: 'vdc', path: second, ...raw }]),
    ],
  })
  return vm
}

/** Does some work while a program does something else before it does what it does. */
async function withProgram<T>(program: string, before: string, work: () => Promise<T>): Promise<T> {
  const bin = await mkdtemp(join(folder, 'bin-'))
  const script = `#!/bin/bash\nPATH=\${PATH#*:}\n${before}\nexec ${program} "$@"\n`
  await writeFile(join(bin, program), script, { mode: 0o755 })
  const { PATH } = process.env
  process.env.PATH = `${bin}:${PATH}`
  try {
    return await work()
  } finally {
    process.env.PATH = PATH
  }
}

function backup(request: Partial<BackupRequest> = {}): Promise<BackupManifest> {
  return new BackupPipeline(pipelines()).run({ instance: 'web-1', ...request }, { onEvent })
}

test('a running guest on RBD and on a file is backed up at one moment, while it writes, and restored over itself', async () => {
  const [image, second] = [await site.create(4 * MIB), await site.create(MIB)]
  const guest = await createVm(image, { withFile: true, guest: true, second, agent: true })
  await guest.boot()
  await guest.run(
    "for disk in vda vdb; do dd if=/dev/urandom of=/dev/$disk bs=1M count=3 conv=fsync || exit 1; done; printf '%-512d' 0 > /run/number",
  )
  // Flushed writes of the same number to one disk after the other, over and over: of any moment, the numbers are
  // the same, or of the first ones of the disks one more.
  const writer = `while [ ! -e /run/stop ]; do
      number=$((1 + $(cat /run/number)))
      printf '%-512d' $number > /run/number
      for disk in vda vdb vdc; do
        dd if=/run/number of=/dev/$disk bs=512 count=1 conv=notrunc,fsync || exit 1
      done
      touch /run/begun
      usleep 250000 # leaves the processor to others
    done`
  const slow = `[[ " $* " != *' snap create '*${second.slice(4)}* ]] || sleep 1`
  /** Backs up while the guest writes, until an image has been read: all disks at one moment. */
  const backupUnderWrites = async (freeze: 'off' | 'require') => {
    await guest.run('rm -f /run/begun /run/stop')
    const { result } = guest.spawn(writer)
    await guest.run('while [ ! -e /run/begun ]; do usleep 10000; done')
    const told: string[] = []
    let stopped: Promise<unknown> | undefined
    const onCommand = (event: VarveEvent) => {
      onEvent(event)
      if (event.type !== 'command') return
      const said = event.args.join(' ')
      told.push(...(/suspend|resume|snapshot-create-as|snap create|snap ls|export-diff/.exec(said) ?? []))
      if (told.at(-1) === 'export-diff') stopped ??= guest.run('touch /run/stop')
    }
    const pipeline = new BackupPipeline(pipelines())
    const manifest = await withProgram('rbd', slow, () =>
      pipeline.run({ instance: 'web-1', freeze }, { onEvent: onCommand }),
    )
    await (stopped ?? guest.run('touch /run/stop'))
    expect((await result).exitCode).toBe(0)
    // The guest stands still while they are frozen one after the other. Nobody asks for the snapshots' numbers before it
    // goes on.
    const steps = told.slice(told.indexOf('suspend'), told.indexOf('resume') + 1)
    expect(steps).toEqual(['suspend', 'snapshot-create-as', 'snap create', 'snap create', 'resume'])
    return manifest
  }
  const full = await backupUnderWrites('off')
  expect(full).toMatchObject({ kind: 'full', consistency: 'crash', running: true })
  await guest.run(
    'dd if=/dev/zero of=/dev/vda bs=64k seek=4 count=4 conv=fsync && blkdiscard -o 1048576 -l 1048576 /dev/vda && dd if=/dev/urandom of=/dev/vda bs=64k seek=40 count=9 conv=fsync && dd if=/dev/urandom of=/dev/vdb bs=64k seek=9 count=3 conv=fsync',
  )
  const sums: (string | undefined)[] = []
  for (const disk of ['vda', 'vdb', 'vdc']) {
    const { stdout } = await guest.run(`tail -c +${KEPT_FROM + 1} /dev/${disk} | sha256sum`)
    sums.push(stdout.split(' ')[0])
  }
  const next = await backupUnderWrites('require')
  expect(next).toMatchObject({ consistency: 'filesystem', running: true })
  expect(next.disks.map(({ kind, format }) => [kind, format])).toEqual([
    ['incremental', 'rbd-diff'],
    ['incremental', 'qcow2'],
    ['incremental', 'rbd-diff'],
  ])
  let last = 0
  for (const manifest of [full, next]) {
    const path = (disk: string) => join(folder, `${manifest.id}-${disk}.raw`)
    const disks = { vda: path('vda'), vdb: path('vdb'), vdc: path('vdc') }
    await new RestorePipeline(pipelines()).run({ backup: manifest.id, to: { disks, format: 'raw' } })
    const numbers = await Promise.all(
      Object.values(disks).map(async file => Number((await readFile(file)).toString('latin1', 0, 512))),
    )
    const [first = 0, ...others] = numbers
    expect(numbers, manifest.consistency).toEqual([...numbers].sort((a, b) => b - a))
    expect(first - (others.at(-1) ?? 0), `${manifest.consistency}: ${numbers}`).toBeLessThanOrEqual(1)
    expect(first, manifest.consistency).toBeGreaterThan(last) // the guest went on
    last = first
  }

  await guest.run(
    'dd if=/dev/urandom of=/dev/vda bs=1M count=4 conv=fsync; blkdiscard /dev/vdb; blkdiscard /dev/vdc',
  )
  // A guest that sleeps stands still as well, and is not woken.
  guest.spawn('echo mem > /sys/power/state').result.catch(() => undefined) // it does not answer any more
  await expect.poll(() => guest.state(), { timeout: 30_000, interval: 250 }).toBe('pmsuspended')
  expect((await backup({ disks: ['vda', 'vdc'] })).parent).toBe(next.id)
  expect(await guest.state()).toBe('pmsuspended')

  const request = { backup: next.id, to: { instance: 'web-1' }, powerOffTimeoutMs: 0 }
  await new RestorePipeline(pipelines()).run(request, { onEvent })
  // It is on the new images, and does not wait until all of the old ones is removed.
  await guest.io('vda', 'write -P 7 0 512')
  await guest.destroy()
  const ends = commands().filter(command => / start web-1$|^rbd rm /.test(command))
  expect(ends.map(command => command.split(' ')[0])).toEqual(['virsh', 'rbd', 'rbd'])
  const file = { path: join(folder, 'vdb.qcow2'), format: 'qcow2' } as const
  const disks = [await site.bytes(image), await readContent(file), await site.bytes(second)]
  expect(disks[0]?.[0]).toBe(7)
  expect(disks.map(bytes => createHash('sha256').update(bytes.subarray(KEPT_FROM)).digest('hex'))).toEqual(
    sums,
  )
  expect((await site.ceph.client.list('vms')).filter(name => name.includes('varve'))).toEqual([])
  expect(await recover({ ...pipelines(), storages: [storage] })).toEqual({ runs: [], ok: true })
  expect(JSON.stringify(events)).not.toContain(site.user.secret)
})

thoroughTest('a guest goes on after a backup that was given up while libvirt suspended it', async () => {
  const image = await site.create(4 * MIB)
  const guest = await createVm(image, { withFile: true, guest: false })
  await guest.start()
  const begun = join(folder, 'begun')
  // A suspend that takes its time, as when the cluster lets writes wait, and that libvirt goes on with whatever becomes
  // of the one who asked for it.
  const slow = `case " $* " in
  *' suspend '*)
    touch ${begun}
    setsid bash -c 'sleep 1; exec virsh "$@"' virsh "$@" > /dev/null 2>&1 < /dev/null &
    wait; exit;;
esac`
  await withProgram('virsh', slow, async () => {
    const controller = new AbortController()
    const running = new BackupPipeline(pipelines()).run(
      { instance: 'web-1' },
      { onEvent, signal: controller.signal },
    )
    const given = expect(running).rejects.toMatchObject({ code: 'ABORTED' })
    await expect.poll(() => existsSync(begun), { timeout: 30_000 }).toBe(true)
    controller.abort()
    await given
  })
  expect(commands().some(command => command.endsWith('resume web-1'))).toBe(true)
  expect(await guest.state()).toBe('running')

  // Somebody else's pause is left to them.
  await lab.virsh(['suspend', 'web-1'])
  expect(await host.suspend('web-1')).toBe(false)
  await backup()
  expect(await guest.state()).toBe('paused')

  // Whoever suspended it: what it writes once somebody resumes it is in one image and not in the other.
  const resumed = `[[ " $* " != *' snap create '* ]] || virsh --connect ${lab.uri} resume web-1 > /dev/null`
  const { backups } = await new ChainManager({ storage }).list()
  for (const state of ['paused', 'running']) {
    expect(await guest.state()).toBe(state)
    await withProgram('rbd', resumed, async () => {
      await expect(backup()).rejects.toMatchObject({ code: 'SNAPSHOT_FAILED', retryable: true })
    })
  }
  expect(await guest.state()).toBe('running')
  expect((await new ChainManager({ storage }).list()).backups).toHaveLength(backups.length)
  expect(await site.snapshots(image)).toHaveLength(backups.length)
})

test('a secret that libvirt does not hand out is an error that says what to do', async () => {
  const image = await site.create(MIB)
  const secret = await lab.defineCephSecret(site.user.secret, 'private')
  await createVm(image, { withFile: false, guest: false, secret })
  const refused = async (says: RegExp) => {
    await expect(backup()).rejects.toMatchObject({
      code: 'CEPH_ACCESS_DENIED',
      message: expect.stringMatching(says),
      context: { secret },
    })
  }
  await refused(/is private: .*secret-define/)
  await lab.virsh(['secret-undefine', secret])
  await refused(/is not there/)
  const definition = join(folder, 'secret.xml')
  await writeFile(
    definition,
    `<secret private='no'><uuid>${secret}</uuid><usage type='ceph'><name>${secret}</name></usage></secret>`,
  )
  await lab.virsh(['secret-define', definition])
  await refused(/has no value/)

  // Named by its usage.
  await lab.virsh(['secret-set-value', secret, site.user.secret])
  const domain = (await lab.virsh(['dumpxml', 'web-1'])).replace(`uuid='${secret}'`, `usage='${secret}'`)
  await writeFile(definition, domain)
  await lab.virsh(['define', definition])
  await backup()
  expect(await lab.virsh(['dumpxml', 'web-1'])).toContain(`usage='${secret}'`)
  // A run that has it needs it no more to remove the snapshot that it replaces.
  const onPublish = (event: VarveEvent) => {
    if (event.type === 'stage' && event.stage === 'publish')
      execaSync('virsh', ['--connect', lab.uri, 'secret-undefine', secret])
  }
  const pipeline = new BackupPipeline(pipelines())
  const { id } = await pipeline.run({ instance: 'web-1', rbdSnapshots: 1 }, { onEvent: onPublish })
  const snapshots = await site.cluster.snapshots(image)
  expect(snapshots.map(({ name }) => name)).toEqual([`varve-${id}`])
  await expect(backup()).rejects.toMatchObject({
    code: 'CEPH_ACCESS_DENIED',
    message: expect.stringMatching(/is not there.*secret-define/),
    context: { usage: secret },
  })
})

test('where no disk tells its cluster any more, that of the configuration is taken, and told of', async () => {
  const gone = { instance: 'web-0', disk: 'vda' }
  const own = new LibvirtHost({ uri: lab.uri, rbd: new CephConnector({ conf: site.ceph.conf }) })
  const cluster = await own.rbd(gone, { onEvent })
  expect(await cluster.imagesBeside('vms/any')).toEqual(await site.cluster.imagesBeside('vms/any'))
  await own.rbd(gone, { onEvent })
  const warnings = events.filter(({ type }) => type === 'warning')
  expect(warnings).toEqual([{ type: 'warning', message: expect.stringContaining('web-0/vda') }])
})

test('an instance that is off is backed up, and its restore waits where it was started and saved its memory since, or wrote to its image', async () => {
  const image = await site.create(MIB)
  // Ceph notes the time of a write once a minute by itself.
  await site.ceph.run('rbd', 'config', 'image', 'set', image, 'rbd_mtime_update_interval', '1')
  const guest = await createVm(image, { withFile: false, guest: false })
  await site.write(image, 'write -P 1 0 1M')
  const { id, ...stored } = await backup()
  expect(stored).toMatchObject({ consistency: 'offline', running: false })
  await site.write(image, 'write -P 2 0 1M')
  await guest.start()
  const virsh = (command: string) => execaSync('virsh', ['--connect', lab.uri, command, 'web-1'])
  let swaps = 0
  const onSwap = (event: VarveEvent) => {
    if (event.type !== 'stage' || event.stage !== 'swap' || swaps++ > 0) return
    virsh('start')
    virsh('managedsave')
  }
  const unresolved = { code: 'RUN_UNRESOLVED', message: expect.stringContaining('managedsave-remove') }
  const request = { backup: id, to: { instance: 'web-1' }, powerOffTimeoutMs: 0 }
  await expect(new RestorePipeline(pipelines()).run(request, { onEvent: onSwap })).rejects.toMatchObject(
    unresolved,
  )
  expect((await site.bytes(image))[0]).toBe(2)
  const recoverNow = () => recover({ ...pipelines(), storages: [storage] })
  expect(await recoverNow()).toMatchObject({ ok: false, runs: [{ error: unresolved }] })
  virsh('managedsave-remove')
  await site.write(image, 'write -P 3 0 1M')
  const written = { code: 'RUN_UNRESOLVED', message: expect.stringContaining('was written to') }
  expect(await recoverNow()).toMatchObject({ ok: false, runs: [{ error: written }] })
  expect((await site.bytes(image))[0]).toBe(3)
  await site.ceph.run('rbd', 'rename', image, `${image}-kept`)
  expect(await recoverNow()).toMatchObject({ ok: true, runs: [{ outcome: 'finished' }] })
  expect(await guest.state()).toBe('running')
  expect((await site.bytes(image))[0]).toBe(1)
})

test('a new instance gets new images in the cluster of the old one, and libvirt starts it on them', async () => {
  const image = await site.create(4 * MIB)
  const old = await lab.defineCephSecret(site.user.secret)
  const guest = await createVm(image, { withFile: true, guest: false, secret: old })
  await site.write(image, 'write -P 1 0 1M', 'write -P 2 3M 64k')
  const { id } = await backup()
  // What the definition in the backup says of the cluster does not hold any more.
  const renewed = await lab.defineCephSecret(site.user.secret)
  const definition = join(folder, 'renewed.xml')
  await writeFile(definition, (await lab.virsh(['dumpxml', 'web-1'])).replaceAll(old, renewed))
  await lab.virsh(['define', definition])
  await lab.virsh(['secret-undefine', old])
  const to = { newInstance: 'web-2', directory: folder, rbdPool: 'vms' }
  const { disks } = await new RestorePipeline(pipelines()).run({ backup: id, to }, { onEvent })
  try {
    expect(disks.map(({ path }) => path)).toEqual(['rbd:vms/web-2-vda', join(folder, 'web-2-vdb.qcow2')])
    expect((await site.bytes('vms/web-2-vda')).equals(await site.bytes(image))).toBe(true)
    expect(await site.snapshots('vms/web-2-vda')).toEqual([])
    await lab.virsh(['start', 'web-2'])
    expect(await site.cluster.isOpen('vms/web-2-vda')).toBe(true)
    expect(await site.cluster.isOpen(image)).toBe(false)
    const taken = { backup: id, to: { ...to, newInstance: 'web-3' } }
    await site.ceph.run('rbd', 'create', '--size', '1M', 'vms/web-3-vda')
    await expect(new RestorePipeline(pipelines()).run(taken)).rejects.toMatchObject({ code: 'TARGET_EXISTS' })
  } finally {
    await lab.virsh(['destroy', 'web-2'])
    await lab.virsh(['undefine', 'web-2'])
  }
  expect(await guest.state()).toBe('shut off')
})

thoroughTest(
  'a file on an RBD image as its template is backed up running and off, and on another image refused',
  async () => {
    const [template, other] = [await site.create(4 * MIB), await site.create(4 * MIB)]
    await site.write(template, 'write -P 17 0 4M')
    await site.write(other, 'write -P 34 0 4M')
    const path = join(folder, 'vda.qcow2')
    const backing = `rbd:${template}:conf=${site.ceph.conf}`
    execaSync('qemu-img', ['create', '-f', 'qcow2', '-F', 'raw', '-b', backing, path])
    vm = await lab.createDomain({
      name: 'web-1',
      guest: false,
      disks: [{ target: 'vda', path, format: 'qcow2' }],
    })
    await vm.start()
    const full = await backup()
    expect(full).toMatchObject({ kind: 'full', consistency: 'crash' })
    await vm.io('vda', 'write -P 51 1M 1M')
    const increment = await backup()
    expect(increment).toMatchObject({ kind: 'incremental', consistency: 'crash' })
    await vm.destroy()
    const off = await backup()
    expect(off).toMatchObject({ kind: 'incremental', consistency: 'offline' })
    const target = join(folder, 'restored.qcow2')
    await new RestorePipeline(pipelines()).run({ backup: off.id, to: { disks: { vda: target } } })
    const latest = ['read -P 17 0 1M', 'read -P 51 1M 1M', 'read -P 17 2M 2M']
    await qemuIo(target, 'qcow2', latest)
    await qemuIo(path, 'qcow2', latest)

    // libvirt gives QEMU what the definition says, whatever the image does.
    const source = `<source protocol='rbd' name='${other}'><config file='${site.ceph.conf}'/></source>`
    const store = `<backingStore type='network'><format type='raw'/>${source}<backingStore/></backingStore>`
    const definition = await lab.virsh(['dumpxml', '--inactive', vm.name])
    await host.define(
      definition.replace(/(<source file=.*?\/>)(\s*<backingStore[\s\S]*<\/backingStore>)?/, `$1${store}`),
    )
    await vm.start()
    await expect(backup()).rejects.toMatchObject({
      code: 'DISK_UNSUPPORTED',
      context: { disk: 'vda', given: `rbd:${other}:conf=${site.ceph.conf}`, named: backing },
    })
  },
)

thoroughTest(
  'a file on an RBD image as its template is backed up where QEMU has that without a node of the raw driver',
  async () => {
    const template = await site.create(4 * MIB)
    await site.write(template, 'write -P 17 0 4M')
    const path = join(folder, 'vda.qcow2')
    const backing = `rbd:${template}:conf=${site.ceph.conf}`
    execaSync('qemu-img', ['create', '-f', 'qcow2', '-F', 'raw', '-b', backing, path])
    const disks = [{ target: 'vda', path, format: 'qcow2' }] as const
    vm = await lab.createDomain({ name: 'web-1', guest: false, bareRaw: true, disks })
    await vm.start()
    const drivers = JSON.stringify(await vm.qmp('query-named-block-nodes', { flat: true })).match(
      /"drv":"\w+"/g,
    )
    expect(drivers?.sort()).toEqual(['"drv":"file"', '"drv":"qcow2"', '"drv":"rbd"'])
    const { id } = await backup()
    const target = join(folder, 'restored.qcow2')
    await new RestorePipeline(pipelines()).run({ backup: id, to: { disks: { vda: target } } })
    await qemuIo(target, 'qcow2', ['read -P 17 0 4M'])
  },
)
