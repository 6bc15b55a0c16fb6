import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { LocalDriver } from '@varve/driver-local'
import { afterEach, beforeEach, expect, test } from 'vitest'
import { BackupPipeline } from '../src/backup-pipeline.ts'
import type { VarveEvent } from '../src/events.ts'
import type { DiskOverlay } from '../src/host.ts'
import { LibvirtHost } from '../src/libvirt-host.ts'

let folder: string
let host: LibvirtHost
const image = (disk: string) => join(folder, disk)

/**
 * A domain of libvirt's own driver for tests, which needs no daemon, and takes no snapshot of disks: whatever gets to it is
 * refused there.
 */
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'varve-host-'))
  const node = join(folder, 'node.xml')
  const disks = ['vda', 'vdb', 'vdc'].map(
    name =>
      `<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='${image(name)}'/><target dev='${name}'/></disk>`,
  )
  await writeFile(
    node,
    `<node><domain type='test'><name>web-1</name><memory>8192</memory><os><type>hvm</type></os><devices>${disks.join('')}</devices></domain></node>`,
  )
  host = new LibvirtHost({ uri: `test://${node}` })
})
afterEach(() => rm(folder, { recursive: true }))

const overlayOf = (disk: string, base = image(disk)): DiskOverlay => ({
  disk,
  base,
  baseFormat: 'qcow2',
  overlay: join(folder, `${disk}.overlay`),
})

test('all chosen disks are frozen by one command that does all or nothing, and no other disk', async () => {
  const commands: (readonly string[])[] = []
  const onEvent = (event: VarveEvent) => {
    if (event.type === 'command' && event.args.includes('snapshot-create-as')) commands.push(event.args)
  }
  const freezing = host.snapshot('web-1', [overlayOf('vda'), overlayOf('vdc')], { onEvent })
  await expect(freezing).rejects.toMatchObject({ message: expect.stringContaining('unsupported flags') })
  expect(commands).toHaveLength(1)
  expect(commands[0]).toEqual(expect.arrayContaining(['--disk-only', '--atomic']))
  expect(commands[0]?.filter(arg => /^vd/.test(arg))).toEqual([
    `vda,snapshot=external,driver=qcow2,file=${folder}/vda.overlay`,
    'vdb,snapshot=no',
    `vdc,snapshot=external,driver=qcow2,file=${folder}/vdc.overlay`,
  ])
})

test('a disk that is not on the file any more which the plan has is not frozen', async () => {
  const freezing = (overlay: DiskOverlay) => host.snapshot('web-1', [overlayOf('vda'), overlay])
  const refused = { code: 'SNAPSHOT_FAILED', retryable: true }
  const before = image('before')
  await expect(freezing(overlayOf('vdb', before))).rejects.toMatchObject({
    ...refused,
    context: { disk: 'vdb', path: before, found: image('vdb') },
  })
  await expect(freezing(overlayOf('vdx'))).rejects.toMatchObject({
    ...refused,
    context: { disk: 'vdx', found: undefined },
  })
  await expect(freezing(overlayOf('vdb'))).rejects.toMatchObject({
    message: expect.stringContaining('unsupported flags'),
  })
})

test('the primary disk is the first one, be it one that cannot be backed up', async () => {
  expect(await host.disks('web-1')).toMatchObject({ primary: 'vda' })
  const xml = (await host.describe('web-1')) ?? ''
  await writeFile(
    join(folder, 'shared.xml'),
    `<node>${xml.replace("<target dev='vda'", "<shareable/><target dev='vda'").replace(/ id='\d+'/, '')}</node>`,
  )
  const shared = new LibvirtHost({ uri: `test://${join(folder, 'shared.xml')}` })
  const storage = new LocalDriver({ path: folder })
  const backup = new BackupPipeline({ host: shared, storage, stateDir: join(folder, 'state') })
  await expect(backup.run({ instance: 'web-1', disks: 'primary' })).rejects.toMatchObject({
    code: 'DISK_UNSUPPORTED',
    context: { instance: 'web-1', disk: 'vda' },
  })
})
