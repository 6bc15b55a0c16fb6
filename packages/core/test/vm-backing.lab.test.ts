import { link, mkdir, readdir, readFile, symlink } from 'node:fs/promises'
import { join } from 'node:path'
import { checkQcow2, createQcow2, createRaw, type LabDomain, qemuIo } from '@varve/testkit/lab'
import { execa } from 'execa'
import { beforeEach, expect, test } from 'vitest'
import { MiB, useVmSite } from './vm-site.ts'

const site = useVmSite()
const { backup, image, restored } = site
let vm: LabDomain

/** The instance's disk is on the template `own` by its header; there is another template, `other`. */
beforeEach(async () => {
  vm = await site.createVm([{ target: 'vda', size: 4 * MiB }])
  await makeTemplate('own', 0x11)
  await makeTemplate('other', 0x22)
  await layOn('vda', image('own'))
})

async function makeTemplate(name: string, byte: number): Promise<void> {
  await createQcow2(image(name), 4 * MiB)
  await qemuIo(image(name), 'qcow2', [`write -P ${byte} 0 4M`])
}

/** Makes an image whose header names another one. */
async function layOn(name: string, backing: string, format = 'qcow2'): Promise<void> {
  const args = ['create', '-f', 'qcow2', '-F', format, '-b', backing, image(name)]
  await execa('qemu-img', args, { cwd: site.folder })
}

/** Defines what is under the disk, and its path. */
async function define(backingStore: string, path = image('vda')): Promise<void> {
  const disk = `<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='${path}'/>${backingStore}<target dev='vda' bus='virtio'/></disk>`
  const xml = await site.lab.virsh(['dumpxml', '--inactive', vm.name])
  await site.host.define(xml.replace(/<disk [\s\S]*<\/disk>/, disk))
}

const END = '<backingStore/>'
function store(path: string, below = '', format = 'qcow2'): string {
  return storeOf('file', `<source file='${path}'/>`, format, below)
}
function storeOf(type: string, source: string, format: string, below = ''): string {
  return `<backingStore type='${type}'><format type='${format}'/>${source}${below}</backingStore>`
}

/** Reads the disk of the running instance through its own QEMU. */
async function reads(...commands: string[]): Promise<void> {
  const socket = join(site.folder, 'reads.sock')
  await vm.qmp('nbd-server-start', { addr: { type: 'unix', data: { path: socket } } })
  await vm.qmp('block-export-add', { type: 'nbd', id: 'reads', name: 'vda', 'node-name': 'libvirt-1-format' })
  await qemuIo(`nbd+unix:///vda?socket=${socket}`, 'raw', commands, { isOpen: true })
  await vm.qmp('nbd-server-stop')
}

interface Disagreement {
  /** What the instance has under its disk. */
  under: string
  define(): Promise<void>
  /** What it reads by that. */
  read: string
  /** The two images that differ, or `none`. */
  given: [file: string, format?: string]
  named: [file: string, format?: string]
}

const disagreements: Disagreement[] = [
  {
    under: 'another file',
    define: () => define(store(image('other'), END)),
    read: 'read -P 0x22 0 4M',
    given: ['other', 'qcow2'],
    named: ['own', 'qcow2'],
  },
  {
    under: 'nothing',
    define: () => define(END),
    read: 'read -P 0 0 4M',
    given: ['none'],
    named: ['own', 'qcow2'],
  },
  {
    under: 'the same file in another format',
    define: () => define(store(image('own'), '', 'raw')),
    read: 'read -P 0x51 0 1', // a qcow2 image begins with QFI
    given: ['own', 'raw'],
    named: ['own', 'qcow2'],
  },
  {
    under: 'another file further down',
    define: async () => {
      await layOn('middle', image('own'))
      await layOn('vda', image('middle'))
      await define(store(image('middle'), store(image('other'))))
    },
    read: 'read -P 0x22 0 4M',
    given: ['other', 'qcow2'],
    named: ['own', 'qcow2'],
  },
  {
    under: 'a file',
    define: async () => {
      await createQcow2(image('vda'), 4 * MiB)
      await define(store(image('other')))
    },
    read: 'read -P 0x22 0 4M',
    given: ['other', 'qcow2'],
    named: ['none'],
  },
  {
    under: 'a part of the file',
    define: async () => {
      await createRaw(image('raw'), 4 * MiB)
      await qemuIo(image('raw'), 'raw', ['write -P 0x33 0 4M'])
      await layOn('vda', image('raw'), 'raw')
      const slice = "<slices><slice type='storage' offset='1048576' size='1048576'/></slices>"
      await define(storeOf('file', `<source file='${image('raw')}'>${slice}</source>`, 'raw'))
    },
    read: 'read -P 0 1M 3M',
    given: ['*', 'raw'],
    named: ['raw', 'raw'],
  },
  {
    under: 'what a relative name leads to from the folder of a link to the disk',
    define: async () => {
      await layOn('vda', 'own')
      await mkdir(image('links'))
      await symlink('../vda', image('links/vda'))
      await symlink('../other', image('links/own'))
      await define('', image('links/vda'))
    },
    read: 'read -P 0x22 0 4M',
    given: ['links/own', 'qcow2'],
    named: ['own', 'qcow2'],
  },
]

test.each(disagreements)(
  'a disk with $under under it, other than its image says, is not backed up',
  async of => {
    const text = ([file, format]: [string, string?]) => (format ? `${image(file)} (${format})` : file)
    const [given, named] = [text(of.given), text(of.named)]
    await of.define()
    await vm.start()
    await reads(of.read)
    for (const state of ['running', 'off']) {
      if (state === 'off') await vm.destroy()
      const error: unknown = await backup().catch(error => error)
      expect(error, state).toMatchObject({
        code: 'DISK_UNSUPPORTED',
        context: { instance: vm.name, disk: 'vda', ...(of.named[1] && { named: image(of.named[0]) }) },
      })
      if (of.given[0] !== '*')
        expect(error).toHaveProperty('message', expect.stringContaining(` is ${given} for`))
      expect(error).toHaveProperty('message', expect.stringContaining(` ${named} by the image itself`))
    }
    expect(await readdir(site.storagePath)).toEqual([])
  },
)

test('a definition that names the very file of the header by another name or in another way is as good', async () => {
  await symlink('own', image('link'))
  await link(image('own'), image('hard'))
  await site.lab.virsh(['pool-create-as', 'templates', 'dir', '--target', site.folder])
  const volume = storeOf('volume', "<source pool='templates' volume='own'/>", 'qcow2')
  for (const backingStore of [store(image('hard')), volume, store(image('link'), END)]) {
    await define(backingStore)
    const off = await backup({ type: 'full' })
    expect(off.consistency).toBe('offline')
    await site.expectStored(off, ['read -P 0x11 0 4M'])
  }
  await vm.start()
  await reads('read -P 0x11 0 4M')
  const running = await backup()
  expect(running).toMatchObject({ kind: 'incremental', consistency: 'crash' })
  await site.expectStored(running, ['read -P 0x11 0 4M'])
  await site.lab.virsh(['pool-destroy', 'templates'])
})

test('a disk is backed up after a snapshot, when the definition has its backing file', async () => {
  await vm.start()
  const spec = `vda,snapshot=external,file=${image('theirs')}`
  await site.lab.virsh(['snapshot-create-as', vm.name, '--disk-only', '--no-metadata', '--diskspec', spec])
  expect(await site.lab.virsh(['dumpxml', '--inactive', vm.name])).toContain('<backingStore type')
  await vm.io('vda', 'write -P 0x44 1M 1M')
  const wanted = ['read -P 0x11 0 1M', 'read -P 0x44 1M 1M', 'read -P 0x11 2M 2M']
  await site.expectStored(await backup(), wanted)
  await vm.destroy()
  const off = await backup()
  expect(off).toMatchObject({ kind: 'incremental', consistency: 'offline' })
  await site.expectStored(off, wanted)
})

test('a disk on an export of an NBD server is backed up, also where the definition names that itself', async () => {
  await createRaw(image('raw'), 4 * MiB)
  await qemuIo(image('raw'), 'raw', ['write -P 0x55 0 4M'])
  const socket = image('sock')
  const pidFile = image('pid')
  const options = ['--persistent', '--read-only', '--shared', '8', '--format', 'raw', '--export-name', 'raw']
  await execa('qemu-nbd', ['--fork', ...options, '--pid-file', pidFile, '--socket', socket, image('raw')])
  try {
    await layOn('vda', `nbd+unix:///raw?socket=${socket}`, 'raw')
    const named = (name: string) =>
      storeOf(
        'network',
        `<source protocol='nbd' name='${name}'><host transport='unix' socket='${socket}'/></source>`,
        'raw',
      )
    await define(named('other'))
    await expect(backup()).rejects.toMatchObject({ code: 'DISK_UNSUPPORTED' })
    await define(named('raw'))
    await site.expectStored(await backup(), ['read -P 0x55 0 4M'])
    await vm.start()
    await site.expectStored(await backup(), ['read -P 0x55 0 4M'])
    await vm.destroy()
  } finally {
    process.kill(Number(await readFile(pidFile, 'utf8')))
  }
})

test('a disk whose image names its backing file by a relative name is backed up, running and off', async () => {
  await layOn('middle', 'own')
  await layOn('vda', 'middle')
  await vm.start()
  const full = await backup()
  expect(full).toMatchObject({ kind: 'full', consistency: 'crash' })
  await vm.io('vda', 'write -P 0x44 1M 1M')
  const increment = await backup()
  expect(increment).toMatchObject({ kind: 'incremental', consistency: 'crash' })
  await site.expectCleanHost([`varve-${increment.id}`])
  await vm.io('vda', 'write -P 0x55 2M 1M')
  await vm.destroy()
  const off = await backup()
  expect(off).toMatchObject({ kind: 'incremental', consistency: 'offline' })

  const asBefore = 'read -P 0x11 0 1M'
  await site.expectStored(full, ['read -P 0x11 0 4M'])
  await site.expectStored(increment, [asBefore, 'read -P 0x44 1M 1M', 'read -P 0x11 2M 2M'])
  const latest = [asBefore, 'read -P 0x44 1M 1M', 'read -P 0x55 2M 1M', 'read -P 0x11 3M 1M']
  await qemuIo(await restored(off), 'qcow2', latest)
  await qemuIo(image('vda'), 'qcow2', latest)
  await checkQcow2(image('vda'))
  await site.restore({ backup: full.id, to: { instance: vm.name } })
  await qemuIo(image('vda'), 'qcow2', ['read -P 0x11 0 4M'])
  await qemuIo(image('own'), 'qcow2', ['read -P 0x11 0 4M'])
})
