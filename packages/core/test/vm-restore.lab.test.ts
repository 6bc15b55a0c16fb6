import { mkdir, open, readdir, readFile, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { qemuIo, sha256Content, sha256File } from '@varve/testkit/lab'
import { expect, test } from 'vitest'
import { DiskLock } from '../src/disk-lock.ts'
import { readDomainXml } from '../src/domain-xml.ts'
import type { VarveEvent } from '../src/events.ts'
import { MiB, useVmSite } from './vm-site.ts'

const site = useVmSite()
const { createVm, image, backup, restore, content, storedSums } = site

/** 13 bytes at the end of the UEFI variables, where firmware that runs writes nothing. */
async function writeAtEnd(path: string, text: string): Promise<void> {
  await using file = await open(path, 'r+')
  await file.write(text, (await file.stat()).size - 13)
}

const endOf = async (path: string) => (await readFile(path)).subarray(-13).toString()

const macOf = (xml: string) => /<mac address='([^']+)'/.exec(xml)?.[1]

test('a UEFI instance becomes a new one beside it, and gets its definition and UEFI variables back', async () => {
  const vm = await createVm([{ target: 'vda', size: 16 * MiB }], { uefi: true, memoryMiB: 256 })
  const nvram = vm.nvram ?? expect.fail('no UEFI')
  const card = join(site.folder, 'card.xml')
  await writeFile(card, "<interface type='user'><mac address='52:54:00:a1:b2:c3'/></interface>")
  await site.lab.virsh(['attach-device', vm.name, card, '--config'])
  await vm.start() // makes its UEFI variables
  await vm.destroy()
  await writeAtEnd(nvram, 'of the backup')
  const variables = await sha256File(nvram)
  await qemuIo(image('vda'), 'qcow2', ['write -P 0x11 0 8M'])
  const manifest = await backup()
  const wanted = await content('vda')
  expect(manifest.nvram).toMatchObject({ key: 'nvram.fd' })
  expect(await sha256File(site.stored(manifest, 'nvram.fd'))).toBe(variables)

  // A new instance, while the original goes on.
  await vm.start()
  const directory = join(site.folder, 'copies')
  await mkdir(directory)
  const pid = await vm.qemuPid()
  const copyName = `${vm.name}-copy`
  const result = await restore({
    backup: manifest.id,
    to: { newInstance: copyName, directory },
    start: true,
  })
  expect(result).toMatchObject({ instance: copyName, started: true })
  const copy = await site.lab.virsh(['dumpxml', copyName])
  try {
    const original = await vm.xml()
    const [before, after] = [readDomainXml(original), readDomainXml(copy)]
    const { nvram: copiedVariables = '' } = after
    expect(after).toMatchObject({
      name: copyName,
      nvram: join(directory, `${copyName}-nvram.fd`),
      disks: [{ name: 'vda', source: join(directory, `${copyName}-vda.qcow2`) }],
    })
    expect(after.uuid).not.toBe(before.uuid)
    expect(macOf(original)).toBe('52:54:00:a1:b2:c3')
    expect(macOf(copy)).not.toBe(macOf(original))
    await site.lab.virsh(['destroy', copyName])
    expect(await endOf(copiedVariables)).toBe('of the backup')
    expect(await sha256Content(join(directory, `${copyName}-vda.qcow2`), 'qcow2')).toBe(wanted)
  } finally {
    await site.lab.virsh(['undefine', copyName, '--nvram'])
  }
  expect(await vm.qemuPid()).toBe(pid)

  // Everything of the original changes; the backup brings it back.
  await vm.destroy()
  await writeAtEnd(nvram, 'changed since')
  await qemuIo(image('vda'), 'qcow2', ['write -P 0x77 1M 2M'])
  await site.lab.virsh(['setmaxmem', vm.name, '192M', '--config'])
  expect(await vm.xml()).toContain('>196608</memory>')
  const { uuid } = readDomainXml(await vm.xml())
  await restore({ backup: manifest.id, to: { instance: vm.name }, definition: 'restore' })
  expect(await sha256File(nvram)).toBe(variables)
  expect(await content('vda')).toBe(wanted)
  expect(await vm.xml()).toContain('>262144</memory>')
  expect(readDomainXml(await vm.xml()).uuid).toBe(uuid)
})

test('a definition goes to its own instance only, made anew or as a copy with UEFI variables of its own', async () => {
  const vm = await createVm([{ target: 'vda', size: 16 * MiB }], { uefi: true, memoryMiB: 256 })
  const { nvram = '' } = vm
  const manifest = await backup() // it never ran, so it has no variables yet
  expect(manifest).not.toHaveProperty('nvram')
  const inactive = (name: string) => site.lab.virsh(['dumpxml', '--inactive', name])

  const copy = `${vm.name}-copy`
  const to = { newInstance: copy, directory: site.folder }
  await writeFile(join(site.folder, `${copy}-nvram.fd`), 'of another instance')
  await expect(restore({ backup: manifest.id, to })).rejects.toMatchObject({ code: 'TARGET_EXISTS' })
  await rm(join(site.folder, `${copy}-nvram.fd`))
  await restore({ backup: manifest.id, to })
  try {
    expect(readDomainXml(await inactive(copy)).nvram).toBe(join(site.folder, `${copy}-nvram.fd`))
    const over = { backup: manifest.id, to: { instance: copy }, definition: 'restore' } as const
    await expect(restore(over)).rejects.toMatchObject({ code: 'INVALID_ARGUMENT' })
    expect(readDomainXml(await inactive(vm.name)).disks[0]?.source).toBe(image('vda'))
  } finally {
    await site.lab.virsh(['undefine', copy, '--nvram'])
  }

  // Somebody has made the instance anew, under a UUID of its own and without what it had.
  const before = readDomainXml(await inactive(vm.name)).uuid ?? ''
  const other = '0f4d4b4e-9a24-4b0f-9d0d-2c2a0f4d4b4e'
  const definition = join(site.folder, 'domain.xml')
  await writeFile(definition, (await inactive(vm.name)).replace(before, other).replaceAll('262144', '196608'))
  await site.lab.virsh(['undefine', vm.name, '--nvram'])
  await site.lab.virsh(['define', definition])
  const warnings: string[] = []
  const onEvent = (event: VarveEvent) => event.type === 'warning' && void warnings.push(event.message)
  const again = { backup: manifest.id, to: { instance: vm.name }, definition: 'restore' } as const
  await restore(again, { onEvent })
  expect(warnings).toEqual([
    expect.stringMatching(new RegExp(`its UUID was ${before} and is ${other} by now`)),
  ])
  expect(readDomainXml(await inactive(vm.name))).toMatchObject({ uuid: other, nvram })
  expect(await inactive(vm.name)).toContain('>262144</memory>')
})

test('one disk of two is backed up and restored, and the other is left alone', async () => {
  const vm = await createVm([
    { target: 'vda', size: 16 * MiB },
    { target: 'vdb', size: 16 * MiB },
  ])
  await vm.start()
  const write = (disk: string, at: number) => vm.io(disk, `write -P ${0x40 + at} ${at}M 2M`)
  await write('vda', 0)
  await write('vdb', 1)
  const both = await backup()
  const wanted = await content('vda')

  await write('vda', 4)
  const primary = await backup({ disks: 'primary' })
  expect(primary).toMatchObject({ parent: both.id, disks: [{ name: 'vda', kind: 'incremental' }] })
  expect((await readdir(site.stored(primary, '.'))).filter(name => name.startsWith('vdb'))).toEqual([])
  expect(await storedSums(primary)).toEqual({ vda: await content('vda') })

  await write('vdb', 6)
  const second = await backup({ disks: ['vdb'] })
  // It has what was written since the last backup of this disk, with the backup of the other one in between.
  expect(second).toMatchObject({ parent: both.id, disks: [{ name: 'vdb', kind: 'incremental' }] })
  const vdb = await content('vdb')
  expect(await storedSums(second)).toEqual({ vdb })

  await vm.destroy()
  const untouched = await sha256File(image('vdb'))
  const one = { backup: both.id, to: { instance: vm.name }, disks: ['vda'] }
  {
    await using _other = await DiskLock.acquire([image('vdb')]) // as a restore of it does, which switches the instance
    await expect(restore(one)).rejects.toMatchObject({ code: 'DISK_BUSY', context: { path: image('vdb') } })
  }
  await restore(one)
  expect(await sha256File(image('vdb'))).toBe(untouched)
  expect(await sha256Content(image('vda'), 'qcow2')).toBe(wanted)

  const next = await backup()
  expect(await storedSums(next)).toEqual({ vda: wanted, vdb })
})
